"""Callbacks: one concern, one file. They need `TrainerCore` or a protocol, and never a mixin."""

from ptacc.callbacks.defaults import default_callbacks as default_callbacks
