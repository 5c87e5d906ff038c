"""Mixins: one concern, one file. They never import each other."""
