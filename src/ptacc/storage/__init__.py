"""Directories of checkpoints: written atomically, verified, on local or remote file systems."""
