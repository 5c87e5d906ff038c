"""Nothing in the package can run what it reads: no pickle, no `torch.load`, no `eval`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptacc

ROOT = Path(ptacc.__file__).parent
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pandas.io.pickle"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("builtins.__import__", "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "numpy.fromregex", "pandas.read_pickle"),
}
PICKLING = {"numpy.load", "numpy.save", "numpy.lib.npyio.load", "numpy.lib.format.read_array"}
"""Calls that pickle unless an argument forbids it."""


def offences(source: str) -> Iterator[str]:
    """Yield what in a module's source could run what it reads, or write what such a call reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a name in the module stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        yield from (f"import of {name}" for name in imported if is_in(name, MODULES) or name in CALLS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = dotted(node, names)
            if name in CALLS or is_in(name, MODULES):
                yield name
        if isinstance(node, ast.Call) and dotted(node.func, names) in PICKLING and not forbids_pickles(node):
            yield dotted(node.func, names)


def is_in(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """Return what an expression names, `torch.load` for one; nothing for what is no name, such as a call's result."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (parent := dotted(node.value, names)):
        return f"{parent}.{node.attr}"
    return ""


def forbids_pickles(call: ast.Call) -> bool:
    allowed = [word.value for word in call.keywords if word.arg == "allow_pickle"]
    return all(isinstance(value, ast.Constant) and value.value is False for value in allowed) and bool(allowed)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_what_it_reads(path: Path) -> None:
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "import os, pickle as p", "from pickle import loads", "import marshal", "import shelve"),
        *(
            "import dill",
            "import cloudpickle",
            "import joblib",
            "from joblib.numpy_pickle import load",
            "import _pickle",
        ),
        *("import torch\ntorch.load(path)", "import torch as t\nt.save(state, path)", "from torch import load"),
        *(
            "from torch import load as read\nread(path)",
            "import torch\nread = torch.load",
            "import torch\ntorch.jit.load(p)",
        ),
        *("from torch import serialization\nserialization.load(path)", "import torch.serialization as s\ns.load(path)"),
        *(
            "eval(text)",
            "exec(text)",
            "compile(text, '', 'exec')",
            "__import__(name)",
            "read = eval",
            "map(eval, texts)",
        ),
        *("import builtins\nbuiltins.eval(text)", "from builtins import exec as run\nrun(text)"),
        *("import numpy as np\nnp.load(path)", "import numpy as np\nnp.load(path, allow_pickle=True)"),
        *("from numpy import load\nload(path, allow_pickle=flag)", "import pandas as pd\npd.read_pickle(path)"),
        "def read():\n    if True:\n        import pickle\n        return pickle.load(file)",
    ],
)
def test_the_test_finds_what_would(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        *("model.eval()", "re.compile('a')", "import torch\ntorch.compile(model)", "self.model.eval()", "'eval(1)'"),
        *("from safetensors.torch import load\nload(data)", "import json\njson.load(file)", "trainer.save()"),
        *("import numpy as np\nnp.load(path, allow_pickle=False)", "def compile_it(): ...", "trainer.load(path)"),
    ],
)
def test_the_test_leaves_the_rest(source: str) -> None:
    assert not list(offences(source))
