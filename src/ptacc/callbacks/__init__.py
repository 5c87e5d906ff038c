"""Callbacks, one per file. They depend on `TrainerCore` or on a protocol, not on mixins."""

from ptacc.callbacks.defaults import default_callbacks as default_callbacks
