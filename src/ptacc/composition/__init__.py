"""What happens when a trainer class is defined: options become fields, and the class is checked."""
