"""Callbacks, one per file. They depend on `TrainerCore` or on a protocol, not on mixins."""
