"""The role of a class in a composition: a class attribute, so that the guards need not import the classes."""

from __future__ import annotations

from typing import Literal, TypeAlias

Role: TypeAlias = Literal["core", "mixin", "batch mixin", "loop"]


def get_role(cls: type) -> Role | None:
    """Return the role that `cls` itself declares, or None; the roles of its bases do not count."""
    role: Role | None = cls.__dict__.get("_role")
    return role


def is_mixin(cls: type) -> bool:
    """Return whether `cls` is a mixin: it derives from the core, not from the loop, and declares no role."""
    roles = {get_role(base) for base in cls.__mro__}
    return "core" in roles and "loop" not in roles and get_role(cls) is None
