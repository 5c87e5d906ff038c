"""A public name has one path, `ptacc.<name>` or `ptacc.testing.<name>`, and `__all__` lists them all."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

import ptacc
from ptacc import testing

every_public_module = pytest.mark.parametrize("module", [ptacc, testing], ids=lambda module: module.__name__)


@every_public_module
def test_all_is_complete(module: ModuleType) -> None:
    values = {name for name, value in vars(module).items() if not isinstance(value, ModuleType)}
    assert {name for name in values if not name.startswith("_")} - {"annotations"} == set(module.__all__)


@every_public_module
def test_all_is_sorted(module: ModuleType) -> None:
    # The order that ruff writes: constants, then classes, then functions.
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))


@every_public_module
def test_every_re_export_keeps_its_name(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [alias.name for alias in aliases if alias.asname not in (None, alias.name)] == []
    assert {alias.name for alias in aliases} - {"annotations"} == set(module.__all__)


def test_no_name_is_public_twice() -> None:
    assert not set(ptacc.__all__) & set(testing.__all__)


def test_the_reference_has_what_is_there_for_tests() -> None:
    reference = Path(__file__).parent.parent / "docs/api.md"
    named = re.findall(r"^\.\. auto\w+:: ptacc\.testing\.(\w+)", reference.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(testing.__all__)
