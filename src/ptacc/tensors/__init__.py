"""Nested structures of tensors, and sharded tensors."""
