"""What users' type checkers see: mistakes are refused, right code is not, and the wheel brings all types along.

`make check` runs mypy and pyright over `tests/typing`; what those two runs do not say is tested here.
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

import ptacc
from ptacc import testing
from ptacc.types.protocols import StateDict

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parent.parent
REJECTS = ROOT / "tests/typing/rejects.py"
KIND = re.compile(r"# ==== (?P<kind>.+)")
MISTAKE = re.compile(r"\s*# (?P<number>\d\d) \S.*")
IGNORE = re.compile(r"  # type: ignore\[(?P<codes>[a-z-]+)\]$")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a tool outside this repository's reach, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in {"MYPYPATH", "PYTHONPATH"}}
    environment = kept | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode in {0, 1}, done.stdout
    return done.stdout


# ---- the mistakes, and what is right


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


def test_there_are_many_mistakes_in_their_order() -> None:
    numbers = [number for number, _, _ in mistakes()]
    assert len(numbers) >= 45
    assert numbers == list(range(1, len(numbers) + 1))


def test_at_most_three_mistakes_are_of_one_kind() -> None:
    kinds = Counter(kind for _, kind, _ in mistakes())
    assert {kind: count for kind, count in kinds.items() if not kind or count > 3} == {}


def test_each_mistake_is_one_line_with_one_code() -> None:
    found = {number: [line for line in lines if "type: ignore" in line] for number, _, lines in mistakes()}
    assert {n: lines for n, lines in found.items() if len(lines) != 1 or not IGNORE.search(lines[0])} == {}


def test_pyright_refuses_every_mistake_too(tmp_path: Path) -> None:
    # An ignore of which mypy has no use fails `make check`; pyright has to be asked.
    lines = REJECTS.read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if IGNORE.search(line)}
    (tmp_path / "wrong.py").write_text("\n".join(IGNORE.sub("", line) for line in lines))
    report = json.loads(run(tool("pyright"), "--pythonpath", sys.executable, "--outputjson", "wrong.py", cwd=tmp_path))
    refused = {d["range"]["start"]["line"] + 1 for d in report["generalDiagnostics"] if d["severity"] == "error"}
    assert refused == wrong


def test_what_the_checkers_accept_the_guards_accept_too() -> None:
    names = runpy.run_path(str(ROOT / "tests/typing/accepts.py"))
    assert isinstance(names["everything"], ptacc.Trainer)


# ---- the wheel, in an environment and a folder that know nothing of this repository

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
    """Make an environment with the wheel in it, and the dependencies beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Without isolation nothing is downloaded; where the backend is not installed, pip fetches it.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run(*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=folder)
    # A folder named in a .pth file is searched, but its own .pth files are not read: this repository's is one.
    site_packages = inspect.getfile(pytest).split("/pytest/")[0]
    (package,) = folder.glob("venv/lib/*/site-packages")
    (package / "dependencies.pth").write_text(site_packages)
    return folder / "venv"


@pytest.fixture(scope="module")
def mypys_answer(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Have a user's mypy look at a user's script."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "user.py").write_text(USER.lstrip())
    # What mypy learnt of torch is kept from one run of the tests to the next; the wheel's own modules are read anew.
    alone: list[str | Path] = ["--config-file=", "--cache-dir", ROOT / ".mypy_cache/wheel"]
    python = environment / "bin/python"
    return run(tool("mypy"), "--strict", *alone, "--python-executable", python, "user.py", cwd=folder)


def test_the_wheel_is_what_the_users_python_imports(environment: Path) -> None:
    printed = run(environment / "bin/python", "-c", "import ptacc; print(ptacc.__file__)", cwd=environment)
    assert Path(printed.strip()).is_relative_to(environment)


def test_a_misspelt_option_is_refused_with_the_right_one(mypys_answer: str) -> None:
    errors = [line for line in mypys_answer.splitlines() if "error:" in line]
    assert len(errors) == 1, mypys_answer
    assert 'did you mean "gradient_accumulation_steps"?' in errors[0]


def test_the_constructor_has_every_option_with_its_type(mypys_answer: str) -> None:
    constructor = revealed(mypys_answer)[0]
    assert "(model: torch.nn.modules.module.Module, *, optimizer: torch.optim.optimizer.Optimizer, " in constructor
    for option in ("callbacks: ", "loss_func: def ", "metrics: ", "gradient_accumulation_steps: int =", "float =)"):
        assert option in constructor


def test_nothing_a_user_sees_is_any(mypys_answer: str) -> None:
    shown = revealed(mypys_answer)
    assert len(shown) == USER.count("reveal_type")
    assert [text for text in shown if re.search(r"\bAny\b", text)] == []


def test_pyright_knows_the_type_of_every_public_symbol(environment: Path) -> None:
    python = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(environment)}
    report = run(
        tool("pyright"), "--ignoreexternal", "--outputjson", "--verifytypes", "ptacc", cwd=environment, **python
    )
    counts = json.loads(report)["typeCompleteness"]["exportedSymbolCounts"]
    assert counts["withKnownType"] > 500
    assert counts["withUnknownType"] == 0


def revealed(answer: str) -> list[str]:
    """Return the types that mypy revealed, in their order."""
    return re.findall(r'Revealed type is "(.+)"', answer)


# ---- no `Any` in a public signature

ANY_IS_RIGHT = {
    "Engine.localize": "a value of a state: tensors become this engine's, all else is as it is",
    "EvaluationLoop.__class_getitem__": "not seen by type checkers",
    "DataLoaderConfig.collate_fn": "the dataset and this function know what a sample is, the request does not",
    "MetricLike.compute": "each metric computes values of its own type",
    "MetricLike.update": "each metric takes arguments of its own",
    "Run.batch": "a run knows no batches, whatever they are",
    "Run.count": "counts the batches of a step, whatever they are",
    "Run.states": "the type of each state stands in its key",
    "TrainerCore.all_callbacks": "`Callback[Self]` could not be overridden: a callback is contravariant in `Self`",
    "TrainingLoop.all_callbacks": "as for `TrainerCore`",
    "check_mixin": "options of every type, handed on as keywords",
    "check_order_changes_nothing": "options of every type, handed on as keywords",
    "iris_parts": "options of every type, for `Trainer(**iris_parts())`",
    "tiny_parts": "options of every type, for `Trainer(**tiny_parts())`",
}


def test_no_public_signature_says_any() -> None:
    found = {name for name, annotation, module in public_annotations() if holds_any(resolved(annotation, module))}
    assert sorted(found - ANY_IS_RIGHT.keys()) == []


def test_what_reads_the_signatures_finds_them() -> None:
    names = {name for name, _, _ in public_annotations()}
    assert names >= {"TrainingLoop.train", "EvaluationLoop.evaluate", "Components.optimizer", "Components.history"}
    assert names >= {"assert_split_invariant", "iris"}
    assert holds_any(resolved("Mapping[str, Callback[Any]]", "ptacc.core.hooks"))
    assert not holds_any(resolved("dict[str, Callback[Self]]", "ptacc.core.hooks"))


def public_annotations() -> Iterator[tuple[str, object, str]]:
    """Yield each annotation of what is public: the name of what it belongs to, itself, and the module it stands in."""
    names = [(ptacc, name) for name in ptacc.__all__] + [(testing, name) for name in testing.__all__]
    for module, name in names:
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield from ((name, annotation, value.__module__) for annotation in annotations_of(value))
        elif not isinstance(value, type):
            yield name, value, module.__name__
        else:
            for owner in value.__mro__:
                if owner.__module__.startswith("ptacc"):
                    yield from annotations_in(owner)


def annotations_in(owner: type) -> Iterator[tuple[str, object, str]]:
    """Yield the annotations of a class's own options, methods and properties."""
    for name, annotation in vars(owner).get("__annotations__", {}).items():
        if not name.startswith("_"):
            yield f"{owner.__name__}.{name}", annotation, owner.__module__
    for name, member in vars(owner).items():
        is_private = name.startswith("_") and not name.endswith("__")
        if is_private or (name == "__init__" and dataclasses.is_dataclass(owner)):
            continue  # that constructor is made from the fields
        for annotation in annotations_of(member):
            yield f"{owner.__name__}.{name}", annotation, owner.__module__


def annotations_of(member: object) -> list[object]:
    """Return the annotations of a function, of its overloads where it has any, or of a property."""
    if isinstance(member, property):
        return [annotation for part in (member.fget, member.fset) for annotation in annotations_of(part)]
    function = getattr(member, "__func__", member)
    if not inspect.isfunction(function) or not function.__module__.startswith("ptacc"):
        return []
    signatures = typing.get_overloads(function) or [inspect.unwrap(function)]
    return [annotation for signature in signatures for annotation in signature.__annotations__.values()]


def resolved(annotation: object, module: str) -> object:
    """Return what an annotation says, also where it was imported for type checkers alone."""
    if not isinstance(annotation, str):
        return annotation
    value: object = eval(annotation, {**all_names(), **vars(sys.modules[module])})
    return value


@functools.cache
def all_names() -> dict[str, object]:
    """Return the names of all our modules, for those that a module imports for type checkers alone."""
    ours = [vars(loaded) for name, loaded in sorted(sys.modules.items()) if name.startswith("ptacc.")]
    known: dict[str, object] = {name: value for names in ours for name, value in names.items()}
    return known | {"pd": pd}


def holds_any(annotation: object) -> bool:
    """Say whether an annotation is or contains `Any`; torch's state dicts are of torch's making."""
    if annotation == StateDict:
        return False
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    return annotation is Any or any(map(holds_any, parts))
