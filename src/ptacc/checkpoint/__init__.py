"""Saving, resuming and exporting a run. These objects know no mixin; `CheckpointMixin` adapts them."""
