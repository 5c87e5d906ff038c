"""The training and evaluation loop."""
