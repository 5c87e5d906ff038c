"""The imports of a script: those of the names that it uses."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Collection, Mapping

from ptacc.eject.literals import WIDTH

SETTINGS: tuple[str, ...] = ("DDPCommunicationHookType", "DistributedDataParallelKwargs", "TorchDynamoPlugin")
FROM: Mapping[str, tuple[str, ...]] = {
    "accelerate": ("Accelerator",),
    "accelerate.data_loader": ("prepare_data_loader",),
    "accelerate.utils": ("find_batch_size", "gather_object", "save", *SETTINGS),
    "collections.abc": ("Iterator",),
    "contextlib": ("nullcontext",),
    "dataclasses": ("dataclass",),
    "fnmatch": ("fnmatch",),
    "functools": ("partial",),
    "itertools": ("islice",),
    "torch": ("Tensor", "nn"),
    "torch.nn.modules.batchnorm": ("_NormBase",),
    "torch.optim": ("Optimizer",),
    "torch.optim.lr_scheduler": ("LRScheduler",),
    "torch.optim.swa_utils": ("update_bn",),
    "torch.utils.checkpoint": ("checkpoint",),
    "torch.utils.data": ("DataLoader", "Dataset"),
    "torchmetrics": ("Metric",),
    "typing": ("Any", "NamedTuple"),
}
KNOWN: dict[str, str] = {
    **{name: f"import {name}" for name in ("copy", "hashlib", "math", "random", "struct", "torch")},
    **{name: f"from {module} import {name}" for module, names in FROM.items() for name in names},
    "np": "import numpy as np",
}
"""The import statement of each name that fragments use."""


def import_block(source: str, given: Collection[str]) -> str:
    """Return the imports of a source, sorted and grouped as ruff does it.

    Args:
        source: The source.
        given: Import statements of code of the user, which may name more than is used.

    Example:
        >>> print(import_block("nn.Linear(math.ceil(x), 1)", ["from torch import nn, Tensor"]))
        import math
        <BLANKLINE>
        from torch import nn
    """
    known = KNOWN | {name: text for statement in given for name, text in split_import(statement).items()}
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    statements = {known[name] for name in used if name in known} | {text for text in given if "__future__" in text}
    groups: list[set[str]] = [set(), set(), set()]
    for statement in statements:
        module = statement.split()[1].partition(".")[0]
        groups[0 if module == "__future__" else 1 if module in sys.stdlib_module_names else 2].add(statement)
    return "\n\n".join("\n".join(sorted_imports(group)) for group in groups if group)


def is_known(name: str, value: object) -> bool:
    """Return whether a name that fragments use stands for an object."""
    if name not in KNOWN:
        return False
    (node,) = ast.parse(KNOWN[name]).body
    if isinstance(node, ast.ImportFrom):
        return getattr(importlib.import_module(str(node.module)), name) is value
    assert isinstance(node, ast.Import)
    return importlib.import_module(node.names[0].name) is value


def split_import(statement: str) -> dict[str, str]:
    """Return an import statement for each name of one.

    Example:
        >>> split_import("from torch import nn, Tensor as T")
        {'nn': 'from torch import nn', 'T': 'from torch import Tensor as T'}
    """
    (node,) = ast.parse(statement).body
    assert isinstance(node, ast.Import | ast.ImportFrom)
    start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
    return {alias.asname or alias.name.partition(".")[0]: start + ast.unparse(alias) for alias in node.names}


def sorted_imports(statements: Collection[str]) -> list[str]:
    """Sort import statements, and join those from one module."""
    members: dict[str, list[str]] = {}
    for statement in statements:
        if statement.startswith("from "):
            _, module, _, member = statement.split(maxsplit=3)
            members.setdefault(module, []).append(member)
    joined = [from_import(module, sorted(members[module], key=rank)) for module in sorted(members)]
    return [*sorted(statement for statement in statements if statement.startswith("import ")), *joined]


def rank(name: str) -> tuple[int, str]:
    """Return the key of a name in an import: constants, then classes, then others."""
    return (0 if name.isupper() else 1 if name.lstrip("_")[0].isupper() else 2), name


def from_import(module: str, members: list[str]) -> str:
    """Return an import of several names, one a line if it is too long."""
    line = f"from {module} import {', '.join(members)}"
    listed = "".join(f"    {member},\n" for member in members)
    return line if len(line) <= WIDTH else f"from {module} import (\n{listed})"
