"""Users' type checkers reject mistakes and accept correct code, and the wheel contains all types.

`make check` runs mypy and pyright over `tests/typing`; these tests check what those runs do not.
"""

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

import ptacc
from ptacc import testing
from ptacc.types.protocols import StateDict

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parent.parent
REJECTS = ROOT / "tests/typing/rejects.py"
KIND = re.compile(r"# ==== (?P<kind>.+)")
MISTAKE = re.compile(r"\s*# (?P<number>\d\d+) \S.*")
IGNORE = re.compile(r"  # type: ignore\[(?P<codes>[a-z-]+)\]$")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a tool without this repository on its path, and return its output."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"MYPYPATH", "PYTHONPATH"}}
    environment = inherited | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode in {0, 1}, done.stdout
    return done.stdout


# ---- mistakes and correct code


def mistakes() -> Iterator[tuple[int, str, list[str]]]:
    """Yield each mistake of `rejects.py`: its number, its kind, and the lines up to the next."""
    kind, found = "", list[tuple[int, str, list[str]]]()
    for line in REJECTS.read_text().splitlines():
        if heading := KIND.match(line):
            kind = heading["kind"]
        elif comment := MISTAKE.match(line):
            found.append((int(comment["number"]), kind, []))
        elif found:
            found[-1][2].append(line)
    yield from found


def test_mistakes_are_numbered_in_order() -> None:
    numbers = [number for number, _, _ in mistakes()]
    assert len(numbers) >= 45
    assert numbers == list(range(1, len(numbers) + 1))


def test_at_most_three_mistakes_are_of_one_kind() -> None:
    kinds = Counter(kind for _, kind, _ in mistakes())
    assert {kind: count for kind, count in kinds.items() if not kind or count > 3} == {}


def test_each_mistake_is_one_line_with_one_code() -> None:
    found = {number: [line for line in lines if "type: ignore" in line] for number, _, lines in mistakes()}
    assert {n: lines for n, lines in found.items() if len(lines) != 1 or not IGNORE.search(lines[0])} == {}


def test_pyright_rejects_every_mistake_too(tmp_path: Path) -> None:
    # mypy reports an unused `type: ignore`, which fails `make check`; pyright is run here without them.
    lines = REJECTS.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if IGNORE.search(line)}
    (tmp_path / "wrong.py").write_text("\n".join(IGNORE.sub("", line) for line in lines))
    report = json.loads(run(tool("pyright"), "--pythonpath", sys.executable, "--outputjson", "wrong.py", cwd=tmp_path))
    refused = {d["range"]["start"]["line"] + 1 for d in report["generalDiagnostics"] if d["severity"] == "error"}
    assert refused == wrong


def test_class_definitions_that_checkers_accept_pass_the_guards() -> None:
    names = runpy.run_path(str(ROOT / "tests/typing/accepts.py"))
    assert isinstance(names["everything"], ptacc.Trainer)


# ---- the wheel, in an environment and a folder without this repository

USER = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ptacc import AMPMixin, GradAccumMixin, MetricsMixin, Trainer


class MyTrainer(AMPMixin, GradAccumMixin, MetricsMixin, Trainer):
    mixed_precision = "bf16"
    label_smoothing: float = 0.0


net, data = nn.Linear(4, 3), TensorDataset(torch.zeros(8, 4), torch.zeros(8))
sgd, loss = torch.optim.SGD(net.parameters(), lr=0.1), nn.CrossEntropyLoss()
trainer = MyTrainer(net, loss_func=loss, optimizer=sgd, label_smoothing=0.1)
MyTrainer(net, loss_func=loss, optimizer=sgd, gradient_accumulation_step=4)
reveal_type(MyTrainer)
reveal_type(trainer.accelerator)
reveal_type(trainer.accelerator.gather)
reveal_type(trainer.model)
reveal_type(Trainer(net, loss_func=loss, optimizer=sgd).model.weight)
reveal_type(Trainer(net, loss_func=loss, optimizer=sgd).forward)
reveal_type(trainer.train_step)
reveal_type(trainer.on_batch_end)
reveal_type(trainer.on_step_end)
reveal_type(trainer.around_step)
reveal_type(trainer.update_metrics)
reveal_type(trainer.train(data, num_epochs=1))
reveal_type(trainer.history[-1].eval_loss)
reveal_type(trainer.run.plan.total_steps)
reveal_type(trainer.evaluate({"near": data}["near"]).metrics)
reveal_type(trainer.predict(data)[0])
"""


def tool(name: str) -> Path:
    """Return the path of a tool of the environment that the tests run in."""
    return Path(sys.executable).parent / name


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Without isolation nothing is downloaded; if the build backend is not installed, pip downloads it.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run(*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    # Python searches a folder named in a .pth file, but does not read the .pth files in it: this repository's is one.
    site_packages = inspect.getfile(pytest).split("/pytest/")[0]
    (package,) = folder.glob("venv/lib/*/site-packages")
    (package / "dependencies.pth").write_text(site_packages)
    return folder / "venv"


@pytest.fixture(scope="module")
def mypy_output(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run a user's mypy on a user's script."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.py").write_text(USER.lstrip())
    # The cache of torch's types is reused between test runs; the modules of the wheel are checked again.
    isolated: list[str | Path] = ["--config-file=", "--cache-dir", ROOT / ".mypy_cache/wheel"]
    python = environment / "bin/python"
    return run(tool("mypy"), "--strict", "--verbose", *isolated, "--python-executable", python, "user.py", cwd=folder)


def test_the_users_python_imports_the_wheel(environment: Path) -> None:
    printed = run(environment / "bin/python", "-c", "import ptacc; print(ptacc.__file__)", cwd=environment)
    assert Path(printed.strip()).is_relative_to(environment)


def test_mypy_suggests_the_right_option(mypy_output: str) -> None:
    errors = [line for line in mypy_output.splitlines() if ": error: " in line]
    assert len(errors) == 1, errors
    assert 'did you mean "gradient_accumulation_steps"?' in errors[0]


def test_the_constructor_has_every_option_with_its_type(mypy_output: str) -> None:
    constructor = revealed(mypy_output)[0]
    assert "(model: torch.nn.modules.module.Module, *, optimizer: torch.optim.optimizer.Optimizer, " in constructor
    for option in ("callbacks: ", "loss_func: def ", "metrics: ", "gradient_accumulation_steps: int =", "float =)"):
        assert option in constructor


def test_no_revealed_type_is_any(mypy_output: str) -> None:
    shown = revealed(mypy_output)
    assert len(shown) == USER.count("reveal_type")
    assert [text for text in shown if re.search(r"\bAny\b", text)] == []


def test_a_check_reads_torchmetrics_only_for_users_who_import_it(mypy_output: str) -> None:
    # mypy skips the functions of installed packages, and the imports in them. torchmetrics doubles the time of a check.
    assert [line for line in mypy_output.splitlines() if "torchmetrics" in line] == []


def test_pyright_knows_the_type_of_every_symbol(environment: Path) -> None:
    # --ignoreexternal: torch and Accelerate have symbols without types, which ptacc cannot change.
    python = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(environment)}
    report = run(
        tool("pyright"), "--ignoreexternal", "--outputjson", "--verifytypes", "ptacc", cwd=environment, **python
    )
    symbols = json.loads(report)["typeCompleteness"]["symbols"]
    assert len(symbols) > 2500
    # A type that pyright infers and another checker could infer differently does not count as known.
    assert [(s["name"], s["diagnostics"]) for s in symbols if not s["isTypeKnown"]] == []


def revealed(output: str) -> list[str]:
    """Return the types that mypy revealed, in order."""
    return re.findall(r'Revealed type is "(.+)"', output)


# ---- no `Any` in a public signature

ALLOWED_ANY = {
    "EvaluationLoop.__class_getitem__": "hidden from type checkers",
    "DataLoaderConfig.collate_fn": "the type of samples is known to the dataset and to this function only",
    "MetricLike.compute": "each metric has its own type of values",
    "MetricLike.update": "each metric has its own arguments",
    "OptimizerDict.state": "as in torch's Optimizer",
    "Run.batch": "a run does not depend on the type of batches",
    "Run.begin_step": "a run does not depend on the type of batches",
    "Run.count_window": "a run does not depend on the type of batches",
    "Run.read_epoch": "a run does not depend on the type of batches",
    "Run.skip_window": "a run does not depend on the type of batches",
    "Run.states": "the type of each state is in its key",
    "Trainer.check_batch": "a mixin before it names the type of its batches, and so may a class derived from it",
    "Trainer.predict_step": "as for `Trainer.check_batch`",
    "TrainerCore.all_callbacks": "`Callback[Self]` could not be overridden: a callback is contravariant in `Self`",
    "TrainingLoop.all_callbacks": "as for `TrainerCore`",
    "check_mixin": "options of any type, passed on as keywords",
    "check_order_changes_nothing": "options of any type, passed on as keywords",
    "iris_parts": "options of any type, for `Trainer(**iris_parts())`",
    "tiny_parts": "options of any type, for `Trainer(**tiny_parts())`",
}


def test_no_public_signature_contains_any() -> None:
    found = {name for name, annotation, module in public_annotations() if holds_any(resolved(annotation, module))}
    assert sorted(found - ALLOWED_ANY.keys()) == []


def test_all_public_signatures_are_read() -> None:
    names = {name for name, _, _ in public_annotations()}
    assert names >= {"TrainingLoop.train", "EvaluationLoop.evaluate", "TrainerBase.optimizer", "TrainerBase.history"}
    assert names >= {"assert_split_invariant", "iris"}
    assert holds_any(resolved("Mapping[str, Callback[Any]]", "ptacc.core.hooks"))
    assert not holds_any(resolved("dict[str, Callback[Self]]", "ptacc.core.hooks"))


def public_annotations() -> Iterator[tuple[str, object, str]]:
    """Yield the annotations of all public names: the name, the annotation, and the module that contains it."""
    names = [(ptacc, name) for name in ptacc.__all__] + [(testing, name) for name in testing.__all__]
    for module, name in names:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield from ((name, annotation, value.__module__) for annotation in member_annotations(value))
        elif not isinstance(value, type):
            yield name, value, module.__name__
        else:
            for owner in value.__mro__:
                if owner.__module__.startswith("ptacc"):
                    yield from class_annotations(owner)


def class_annotations(owner: type) -> Iterator[tuple[str, object, str]]:
    """Yield the annotations of a class's own options, methods and properties."""
    for name, annotation in vars(owner).get("__annotations__", {}).items():
        if not name.startswith("_"):
            yield f"{owner.__name__}.{name}", annotation, owner.__module__
    for name, member in vars(owner).items():
        is_private = name.startswith("_") and not name.endswith("__")
        if is_private or (name == "__init__" and dataclasses.is_dataclass(owner)):
            continue  # the constructor is generated from the fields
        for annotation in member_annotations(member):
            yield f"{owner.__name__}.{name}", annotation, owner.__module__


def member_annotations(member: object) -> list[object]:
    """Return the annotations of a function, of its overloads if it has any, or of a property."""
    if isinstance(member, property):
        return [annotation for part in (member.fget, member.fset) for annotation in member_annotations(part)]
    function = getattr(member, "__func__", member)
    if not inspect.isfunction(function) or not function.__module__.startswith("ptacc"):
        return []
    signatures = typing.get_overloads(function) or [inspect.unwrap(function)]
    return [annotation for signature in signatures for annotation in signature.__annotations__.values()]


def resolved(annotation: object, module: str) -> object:
    """Evaluate an annotation, even if its names are imported for type checkers only."""
    if not isinstance(annotation, str):
        return annotation
    value: object = eval(annotation, {**all_names(), **vars(sys.modules[module])})
    return value


@functools.cache
def all_names() -> dict[str, object]:
    """Return the names of all modules of ptacc, for names that a module imports for type checkers only."""
    namespaces = [vars(loaded) for name, loaded in sorted(sys.modules.items()) if name.startswith("ptacc.")]
    known: dict[str, object] = {name: value for names in namespaces for name, value in names.items()}
    return known | {"pd": pd, "Figure": Figure}


def holds_any(annotation: object) -> bool:
    """Return whether an annotation is or contains `Any`; the state dicts of torch do not count."""
    if annotation == StateDict:
        return False
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    return annotation is Any or any(map(holds_any, parts))
