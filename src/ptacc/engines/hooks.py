"""Hooks that an engine puts on a user's modules, and takes off again."""

from __future__ import annotations

from torch import nn


def remove_hooks(module: nn.Module, packages: tuple[str, ...]) -> None:
    """Take the hooks off a module that are functions of some packages."""
    tables = [table for name, table in vars(module).items() if isinstance(table, dict) and "_hooks" in name]
    theirs = [key for table in tables for key, hook in table.items() if is_of(packages, hook)]
    for table in tables:  # a hook that takes keywords, or is always called, stands in a second table
        for key in theirs:
            table.pop(key, None)


def is_of(packages: tuple[str, ...], hook: object) -> bool:
    """Say whether a hook comes from one of some packages."""
    return callable(hook) and (getattr(hook, "__module__", None) or "").startswith(packages)
