"""Metrics over processes, and their state."""
