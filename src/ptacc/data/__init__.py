"""From a dataset to the batches of this rank."""
