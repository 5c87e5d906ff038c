"""Engines: wrap the model and step the optimizers."""
