"""Engines: what runs and updates a model that plain torch does not hold whole. Mixins choose them."""
