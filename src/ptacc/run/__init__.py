"""The state of one call of `train()`."""
