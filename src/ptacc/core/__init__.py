"""The base classes of trainers, mixins and callbacks."""
