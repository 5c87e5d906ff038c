"""Searches for a learning rate and a batch size: they train for a few steps, then restore all state."""
