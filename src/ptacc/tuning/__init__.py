"""Finders of a learning rate and of a batch size: they train for a few steps, and leave everything as it was."""
