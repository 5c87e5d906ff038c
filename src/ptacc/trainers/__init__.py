"""Ready compositions."""
