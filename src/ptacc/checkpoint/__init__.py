"""Checkpoints: plain typed objects that know no trainer. `CheckpointMixin` adapts them."""
