"""File systems, local and remote, and paths on them."""
