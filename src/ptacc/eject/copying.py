"""Copies of the user's own functions and methods, as functions of a script."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import resolve_name
from types import FunctionType

from ptacc.eject.imports import KNOWN, is_known, split_import
from ptacc.eject.literals import assignment, is_plain
from ptacc.types.aliases import Pair
from ptacc.types.outputs import StepOutput
from ptacc.types.progress import RunPlan

RENAMED: dict[str, tuple[object, str]] = {
    "Pair": (Pair, "Batch"),
    "RunPlan": (RunPlan, "RunPlan"),
    "StepOutput": (StepOutput, "StepOutput"),
}
"""Names of this library that a function may use, with what a script has in their place."""
DECORATORS = ("override", "hook")


class NotCopiedError(Exception):
    """A function uses something that a script does not have. The message names it."""


@dataclass
class Copies:
    """Copies of functions.

    Args:
        sources: Source by name, each after what it uses.
        imports: Import statements for what they use.
        options: The options of the trainer that they use.
        ours: Names of this library that they use.
    """

    sources: dict[str, str] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    options: set[str] = field(default_factory=set)
    ours: set[str] = field(default_factory=set)

    def add(self, other: Copies) -> None:
        """Add other copies."""
        self.sources |= other.sources
        self.imports |= other.imports
        self.options |= other.options
        self.ours |= other.ours

    @property
    def source(self) -> str:
        """The source of all functions."""
        return "\n\n".join(self.sources.values())


@dataclass(frozen=True)
class Method:
    """How a method becomes a function.

    Args:
        parameters: What takes the place of `self` among its parameters: `"model, "` or nothing.
        attributes: What takes the place of `self.name`, by name.
        options: Names of options: `self.name` becomes the constant `NAME`.
    """

    parameters: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    options: frozenset[str] = frozenset()


def copy_function(function: object, name: str, method: Method | None = None) -> Copies:
    """Copy a function under a name, and what it uses of its module.

    Raises:
        NotCopiedError: It has no source, or uses something that a script does not have.
    """
    copies = Copies()
    add_copy(copies, function, name, method)
    return copies


def add_copy(copies: Copies, function: object, name: str, method: Method | None = None) -> None:
    """Add the copy of a function to others."""
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        raise NotCopiedError(f"{name} is of the type {type(function).__name__}, and not a function of a module")
    if function.__closure__:
        raise NotCopiedError(f"{name} uses super() or variables of another function")
    try:
        source = textwrap.dedent(inspect.getsource(function))
        imports = read_imports(function.__module__)
    except (OSError, TypeError):
        raise NotCopiedError(f"{name} has no file with its source") from None
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    copy = Copy(copies, function.__globals__, node, Edits(source), imports)
    copy.rename(name)
    if method is not None:
        copy.replace_self(method)
    copies.sources[name] = ""  # a recursive function finds itself
    copy.resolve_names()
    del copies.sources[name]
    copies.sources[name] = copy.edits.apply()
    copies.imports |= {imports[name] for name in ("annotations",) if name in imports}


def read_imports(module: str) -> dict[str, str]:
    """Return the import statement of each name that a module imports."""
    statements: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            relative = "." * node.level + (node.module or "")
            node.module, node.level = resolve_name(relative, sys.modules[module].__package__), 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            statements |= split_import(ast.unparse(node))
    return statements


class Edits:
    """Replacements of parts of a source, by the positions of syntax trees."""

    def __init__(self, source: str) -> None:
        self._source = source.encode()
        lines = self._source.splitlines(keepends=True)
        self._starts = [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]
        self._edits: list[tuple[int, int, str]] = []

    def start(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Return the position of the first byte of a node."""
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt | ast.arg) -> int:
        """Return the position after the last byte of a node."""
        return self._starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)

    def replace(self, start: int, end: int, text: str) -> None:
        """Replace the bytes from `start` to `end`."""
        self._edits.append((start, end, text))

    def apply(self) -> str:
        """Return the source with all replacements."""
        source = self._source
        for start, end, text in sorted(self._edits, reverse=True):
            source = source[:start] + text.encode() + source[end:]
        return source.decode()


@dataclass(frozen=True)
class Copy:
    """A copy of a function in the making.

    Args:
        copies: The copies that it belongs to.
        names: The names of its module.
        node: Its syntax tree.
        edits: The replacements in its source.
        imports: The import statements of its module, by name.
    """

    copies: Copies
    names: Mapping[str, object]
    node: ast.FunctionDef
    edits: Edits
    imports: Mapping[str, str]

    def rename(self, name: str) -> None:
        """Set the name of the copy, and leave out decorators."""
        for decorator in self.node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(called).rpartition(".")[2] not in DECORATORS:
                raise NotCopiedError(f"{name} has the decorator {ast.unparse(decorator)}")
        start = self.edits.start(self.node)
        self.edits.replace(0, start + len(f"def {self.node.name}".encode()), f"def {name}")

    def replace_self(self, method: Method) -> None:
        """Replace `self` among the parameters, and in each `self.name`."""
        own, *others = self.node.args.args
        self.edits.replace(self.edits.start(own), self.edits.start(others[0]), method.parameters)
        replaced: set[ast.expr] = set()
        for node in ast.walk(self.node):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == own.arg:
                text = method.attributes.get(node.attr)
                if text is None and node.attr in method.options:
                    self.copies.options.add(node.attr)
                    text = node.attr.upper()
                if text is None:
                    raise NotCopiedError(f"{self.node.name} uses self.{node.attr}")
                self.edits.replace(self.edits.start(node), self.edits.end(node), text)
                replaced.add(node.value)
        for node in ast.walk(self.node):
            if isinstance(node, ast.Name) and node.id in (own.arg, "super") and node not in replaced:
                raise NotCopiedError(f"{self.node.name} uses {node.id}")

    def resolve_names(self) -> None:
        """Copy or import what the function uses of its module."""
        self._check_outputs()
        for node in self._global_names():
            name, value = node.id, self.names[node.id]
            if name in RENAMED and value is RENAMED[name][0]:
                self.copies.ours.add(name)
                self.edits.replace(self.edits.start(node), self.edits.end(node), RENAMED[name][1])
            elif is_known(name, value):
                continue
            elif name in KNOWN:
                raise NotCopiedError(f"{self.node.name} uses {name}, which is another object in a script")
            elif name in self.imports:
                if self.imports[name].split()[1].partition(".")[0] == "ptacc":
                    raise NotCopiedError(f"{self.node.name} uses ptacc's {name}")
                self.copies.imports.add(self.imports[name])
            elif name not in self.copies.sources:
                if is_plain(value):
                    self.copies.sources[name] = assignment(name, value) + "\n"
                else:
                    add_copy(self.copies, value, name)

    def _check_outputs(self) -> None:
        """Raise `NotCopiedError` for sums and logged values: the `StepOutput` of a script has neither."""
        for node in ast.walk(self.node):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "StepOutput":
                raise NotCopiedError(f"{self.node.name} uses StepOutput.{node.attr}")
            if isinstance(node, ast.keyword) and node.arg == "logged":
                raise NotCopiedError(f"{self.node.name} logs values")
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "StepOutput":  # it is not generic either
                self.edits.replace(self.edits.end(node.value), self.edits.end(node), "")

    def _global_names(self) -> Iterator[ast.Name]:
        """Yield the names of the module."""
        parts = (self.node.args, self.node.returns, *self.node.body)
        nodes = [node for part in parts if part for node in ast.walk(part)]
        names = [node for node in nodes if isinstance(node, ast.Name)]
        own = {node.arg for node in nodes if isinstance(node, ast.arg)} | {"self", "super"}
        own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        for node in names:
            if node.id not in own and node.id in self.names:
                yield node
            elif node.id not in own and not hasattr(builtins, node.id):
                raise NotCopiedError(f"{self.node.name} uses {node.id}, which is not defined")
