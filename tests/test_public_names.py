"""A public name has one path, `ptacc.<name>`, and `__all__` lists them all."""

import ast
from pathlib import Path
from types import ModuleType

import ptacc


def test_all_is_complete() -> None:
    values = {name for name, value in vars(ptacc).items() if not isinstance(value, ModuleType)}
    assert {name for name in values if not name.startswith("_")} - {"annotations"} == set(ptacc.__all__)


def test_all_is_sorted() -> None:
    # The order that ruff writes: constants, then classes, then functions.
    assert ptacc.__all__ == sorted(ptacc.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))


def test_every_re_export_keeps_its_name() -> None:
    tree = ast.parse(Path(ptacc.__file__).read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [alias.name for alias in aliases if alias.asname not in (None, alias.name)] == []
    assert {alias.name for alias in aliases} - {"annotations"} == set(ptacc.__all__)
