"""The caches of keys and values that models of transformers return, which training does not use."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from torch import nn

_disabled: list[Any] = []
"""The configurations whose cache is off at present, and that had it on."""


@contextlib.contextmanager
def caches_disabled(model: nn.Module) -> Generator[None]:
    """Set `config.use_cache` to False for the block, of a model and its submodules."""
    configs = find_caching_configs(model)
    _disabled.extend(configs)
    set_caches(configs, is_on=False)
    try:
        yield
    finally:
        set_caches(configs, is_on=True)
        _disabled[:] = [config for config in _disabled if all(config is not own for own in configs)]


@contextlib.contextmanager
def caches_restored() -> Generator[None]:
    """Set `config.use_cache` to what it was before `caches_disabled`, for the block: a configuration is saved so."""
    configs = list(_disabled)
    set_caches(configs, is_on=True)
    try:
        yield
    finally:
        set_caches(configs, is_on=False)


def find_caching_configs(model: nn.Module) -> list[Any]:
    """Return the configurations of transformers' models that turn on a cache of keys and values, each once."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if getattr(config, "use_cache", None) is True]


def set_caches(configs: list[Any], *, is_on: bool) -> None:
    """Set `use_cache` of configurations."""
    for config in configs:
        config.use_cache = is_on
