"""Values, protocols and arguments that users see."""
