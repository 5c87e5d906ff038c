"""Packages import lower packages only, and no folder or package grows too large."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# From the top down: a module imports from its own package and from those below it.
PACKAGES = [
    "__main__",
    "cli",
    "eject",
    "report",
    "",  # ptacc itself, which re-exports the public names
    "protocols",
    "testing",
    "tuning",
    "schedules",
    "options",
    "samplers",
    "trainers",
    "mixins",
    "tracking",
    "metrics",
    "loop",
    "checkpoint",
    "callbacks",
    "core",
    "profiling",
    "run",
    "engines",
    "data",
    "distributed",
    "model",
    "composition",
    "storage",
    "serialization",
    "tensors",
    "rng",
    "types",
    "files",
    "console",
    "validation",
    "display",
    "errors",
    "public",
]
NEVER_EACH_OTHER = ("mixins", "callbacks")
# The base class of the two mixins that shard a model.
SHARED_BASE = "ptacc.mixins.engines.model_sharding"
MAY_IMPORT_ACCELERATE = {
    "ptacc.distributed.accelerator",
    "ptacc.distributed.accelerator_settings",
    "ptacc.mixins.compile",
    "ptacc.tracking.accelerate",
    *(f"ptacc.mixins.engines.{engine}" for engine in ("ddp", "deepspeed", "fsdp", "tensor_parallel")),
}
MOST_FILES = 20
MOST_LINES = 2_600


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted((SOURCE / "ptacc").rglob("*.py"))}


def package(module: str) -> str:
    return module.partition(".")[2].split(".")[0]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            members = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in members)


IMPORTS = {module: set(imported_modules(ast.parse(path.read_text()))) - {module} for module, path in MODULES.items()}


def own_imports(module: str) -> set[str]:
    return {name for name in IMPORTS[module] if name.split(".")[0] == "ptacc"}


def is_allowed(module: str, target: str) -> bool:
    row, other = PACKAGES.index(package(module)), PACKAGES.index(package(target))
    if row == other:
        # The `__init__` of a folder and the list of default callbacks import the modules of the folder.
        is_list = module == f"ptacc.{package(module)}" or module == "ptacc.callbacks.defaults"
        return package(module) not in NEVER_EACH_OTHER or is_list or target == SHARED_BASE
    return row < other


def test_every_module_is_in_a_known_package() -> None:
    assert {package(module) for module in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_lower_packages_only(module: str) -> None:
    upward = sorted(target for target in own_imports(module) if not is_allowed(module, target))
    assert not upward, f"{module} imports {upward}, which are not below it in PACKAGES"


def test_there_are_no_circular_imports() -> None:
    TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()


def test_only_adapters_import_accelerate() -> None:
    importers = {
        module for module, names in IMPORTS.items() if any(name.split(".")[0] == "accelerate" for name in names)
    }
    assert importers <= MAY_IMPORT_ACCELERATE


def test_no_folder_has_too_many_files() -> None:
    files = Counter(path.parent for path in MODULES.values())
    assert all(number <= MOST_FILES for number in files.values()), files


def test_no_package_is_too_large() -> None:
    lines = Counter[str]()
    for module, path in MODULES.items():
        lines[package(module)] += len(path.read_text().splitlines())
    assert max(lines.values()) <= MOST_LINES, lines.most_common(3)
