"""Ranks, their failures, agreement between them, and the accelerator."""
