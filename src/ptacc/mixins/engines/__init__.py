"""Mixins that choose the engine of a run."""
