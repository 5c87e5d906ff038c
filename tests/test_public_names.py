"""Each public name has one path, in `ptacc` or one of its public modules."""

import ast
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

import ptacc
from ptacc import errors, options, protocols, samplers, schedules, testing, tracking, trainers, tuning
from ptacc.composition.guards import get_hook_shape
from ptacc.loop.explain import declared_hooks

MODULES = [ptacc, options, protocols, samplers, schedules, testing, tracking, trainers, tuning]
HOOK = re.compile(r"\b((?:default|factory)(?= hook)|(?:fold|around|event)(?=[:,.]))", re.IGNORECASE)
MOST_NAMES = 65
MOST_ATTRIBUTES = 45

every_public_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


@every_public_module
def test_all_is_complete(module: ModuleType) -> None:
    values = {name for name, value in vars(module).items() if not isinstance(value, ModuleType)}
    assert {name for name in values if not name.startswith("_")} - {"annotations"} == set(module.__all__)


@every_public_module
def test_all_is_sorted(module: ModuleType) -> None:
    # In the order of ruff: constants, then classes, then functions.
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))


@every_public_module
def test_every_re_export_keeps_its_name(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert [alias.name for alias in aliases if alias.asname not in (None, alias.name)] == []
    assert {alias.name for alias in aliases} - {"annotations"} == set(module.__all__)


def test_no_name_is_public_twice() -> None:
    raised = [name for name, value in vars(errors).items() if isinstance(value, type)]
    names = [*raised, *(name for module in MODULES for name in module.__all__)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", [ptacc, protocols])
def test_a_class_names_its_public_module(module: ModuleType) -> None:
    found = [value for value in vars(module).values() if isinstance(value, type)]
    assert found
    assert [value for value in found if value.__module__ != module.__name__] == []
    assert [value for value in found if pickle.loads(pickle.dumps(value)) is not value] == []


@every_public_module
def test_annotations_of_public_classes_can_be_read(module: ModuleType) -> None:
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type):
            assert not any(isinstance(hint, str) for hint in vars(value).get("__annotations__", {}).values())
            get_type_hints(value)


def test_there_are_few_public_names() -> None:
    assert len(ptacc.__all__) <= MOST_NAMES


def test_a_trainer_has_few_public_attributes_apart_from_hooks() -> None:
    trainer = ptacc.Trainer(**testing.tiny_parts())
    public = {name for name in dir(trainer) if not name.startswith("_")} - declared_hooks(ptacc.Trainer).keys()
    assert len(public) <= MOST_ATTRIBUTES


def test_what_its_docstring_calls_a_hook_is_declared_as_one_of_that_shape() -> None:
    public = [value for name in ptacc.__all__ if isinstance(value := getattr(ptacc, name), type)]
    trainers = {base for cls in public if issubclass(cls, ptacc.TrainerCore) for base in cls.__mro__}
    for cls in trainers:
        for name, value in vars(cls).items():
            is_new = not any(name in vars(base) for base in cls.__mro__[1:])
            if is_new and not name.startswith("_") and (said := HOOK.search(getattr(value, "__doc__", "") or "")):
                assert get_hook_shape(value) == said[0].lower(), f"{cls.__name__}.{name}"
