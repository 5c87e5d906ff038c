"""Imports among ptacc's modules run one way; a module without a room in this house is refused."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# From the roof down: a module imports from the rows below its own. `folder/` is one room for all in it.
ROWS = [
    ["ptacc.__main__"],
    ["ptacc", "ptacc.testing/", "ptacc.cli"],
    ["ptacc.trainers/", "ptacc.tuning/"],
    ["ptacc.mixins/"],
    ["ptacc.engines/"],
    ["ptacc.loop.loop"],
    ["ptacc.loop.setup"],
    ["ptacc.loop.evaluation"],
    # The loop starts with default callbacks, and callbacks need nothing but the hooks.
    ["ptacc.callbacks/", "ptacc.checkpoint/", "ptacc.core.batch_hooks", "ptacc.loop.explain"],
    ["ptacc.core.hooks"],
    ["ptacc.core.base"],
    ["ptacc.run.run"],
    [
        "ptacc.loop.advice",
        "ptacc.run.history",
        "ptacc.data.map_style",
        "ptacc.distributed.accelerator",
        "ptacc.data.batch",
        "ptacc.distributed.stop_vote",
        "ptacc.core.checks",
        "ptacc.engines.base",
        "ptacc.core.callback",
        "ptacc.data.loading",
        "ptacc.core.late",
        "ptacc.core.loaders",
        "ptacc.distributed.process_group",
        "ptacc.profiling.trace",
        "ptacc.data.sampling",
        "ptacc.data.sources",
        "ptacc.data.transfer",
        "ptacc.data.wrappers",
        "ptacc.model.state_dict",
        "ptacc.run.window",
    ],
    [
        "ptacc.model.averaging",
        "ptacc.model.selection",
        "ptacc.distributed.shutdown",
        "ptacc.distributed.failure",
        "ptacc.composition.composable",
        "ptacc.composition.guards",
        "ptacc.profiling.hardware",
        "ptacc.distributed.rendezvous",
        "ptacc.tensors.structures",
        "ptacc.composition.fields",
        "ptacc.data.partition",
        "ptacc.model.patching",
        "ptacc.rng",
        "ptacc.data.replay",
        "ptacc.composition.roles",
        "ptacc.core.run_options",
        "ptacc.run.state",
        "ptacc.tensors.dtensor",
        "ptacc.distributed.signals",
        "ptacc.profiling.throughput",
        "ptacc.run.history_file",
        "ptacc.composition.type_arguments",
    ],
    ["ptacc.types.protocols", "ptacc.types.arguments"],
    ["ptacc.types.aliases"],
    ["ptacc.validation"],
    ["ptacc.errors"],
    # Run whenever any module of the folder is imported, so it can import none of them.
    ["ptacc.core"],
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row}
NEVER_EACH_OTHER = ("ptacc.mixins/", "ptacc.callbacks/")
MAY_IMPORT_ACCELERATE = {"ptacc.distributed.accelerator"} | {
    f"ptacc.mixins.{engine}" for engine in ("compile", "deepspeed", "fsdp", "tensor_parallel")
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted((SOURCE / "ptacc").rglob("*.py"))}


def room_of(module: str) -> str:
    folder = ".".join(module.split(".")[:2]) + "/"
    room = folder if folder in ROW else module
    assert room in ROW, f"{module}: has no row; give it a room in ROWS of tests/test_imports.py"
    return room


def imports_of(tree: ast.AST, *, checking: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each imported module, and whether the import stands under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, checking) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((name if name in MODULES else node.module, checking) for name in inside)
        else:
            guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from imports_of(node, checking=checking or guarded)


def ours_in(module: str) -> set[str]:
    found = {
        name
        for name, checking in imports_of(ast.parse(MODULES[module].read_text()))
        # What a hook is given is typed by the core; the core needs the protocols when it runs.
        if name.split(".")[0] == "ptacc" and not (checking and module == "ptacc.types.protocols" and ".core." in name)
    }
    return found - {module}


def is_allowed(module: str, target: str) -> bool:
    room, other = room_of(module), room_of(target)
    if room == other:
        # A folder's __init__ gathers what is in the folder, and so does the list of default callbacks.
        return room not in NEVER_EACH_OTHER or module in {room.removesuffix("/"), "ptacc.callbacks.defaults"}
    same_row_of_the_core = ROW[room] == ROW[other] and module.startswith("ptacc.core.") and ".core." in target
    return ROW[room] < ROW[other] or same_row_of_the_core


def test_every_module_has_a_room() -> None:
    assert all(room_of(module) for module in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_below(module: str) -> None:
    upward = sorted(target for target in ours_in(module) if not is_allowed(module, target))
    assert not upward, f"{module} imports {upward}: not below it in ROWS"


def test_no_imports_run_in_a_circle() -> None:
    TopologicalSorter({module: ours_in(module) for module in MODULES}).prepare()


def test_accelerate_is_imported_by_its_adapters_alone() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        for name, _ in imports_of(ast.parse(path.read_text()))
        if name.split(".")[0] == "accelerate"
    }
    assert importers <= MAY_IMPORT_ACCELERATE
