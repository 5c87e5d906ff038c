"""The part that a class plays in a composition, told by a class attribute: guards need not import the classes."""

from __future__ import annotations

from typing import Literal, TypeAlias

Role: TypeAlias = Literal["core", "mixin", "batch mixin", "loop"]


def get_role(cls: type) -> Role | None:
    """Return the role that `cls` itself declares, None where it declares none (its bases may)."""
    role: Role | None = cls.__dict__.get("_role")
    return role


def is_mixin(cls: type) -> bool:
    """Say whether `cls` is a mixin: derived from the core, declaring no role, and with no loop in it."""
    roles = {get_role(base) for base in cls.__mro__}
    return "core" in roles and "loop" not in roles and get_role(cls) is None


def find_loop(cls: type) -> type | None:
    """Return the loop among the bases of `cls`, None for a mixin."""
    return next((base for base in cls.__mro__ if get_role(base) == "loop"), None)
