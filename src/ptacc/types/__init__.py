"""The values, protocols and arguments that users see."""
