"""Stores to attack, and what becomes of an attack."""

import itertools
import random
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ptacc.checkpoint.parts import SHARED, encode_parts, rank_files, read_parts, write_parts
from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.storage.manifest import Manifest
from ptacc.storage.store import MANIFEST, CheckpointStore
from ptacc.tensors.dtensor import Shard
from tests.checkpoint.cells import Trial, run_in_a_cell
from tests.checkpoint.faults.payloads import reseal

KEY = b"of the run"
FILES = (MANIFEST, "rank-0.json", "rank-0.safetensors", "shared.json", "shared.safetensors")
Attack = Callable[[Path], object]
LEAVES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device, np.ndarray)
CONTAINERS = (list, tuple, dict, OrderedDict, Counter, set, frozenset, torch.Size)


def save(store: CheckpointStore, step: int) -> Manifest:
    """Save what a small run has."""
    torch.manual_seed(step)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    shared = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "progress": {"step": step, "labels": {"cat", "dog"}, "counts": Counter("abca"), "best": float("inf")},
    }
    numbers = {"python": random.getstate(), "numpy": np.random.default_rng(step).bit_generator.state}
    private = {"random": numbers | {"torch": torch.get_rng_state(), "array": np.arange(step + 3.0)}}
    pending = store.begin(f"step-{step}")
    files = write_parts(store, pending, SHARED, encode_parts(shared))
    files |= write_parts(store, pending, rank_files(0), encode_parts(private))
    names = (*shared, *private)
    manifest = Manifest("", "a run", step, 1, 2, 1, metrics={"loss": 1 / step}, parts=names, files=files)
    return store.commit(pending, manifest)


@dataclass(frozen=True)
class Arena:
    """Stores of two checkpoints of which the second is attacked, and a secret that is not in them.

    Args:
        whole: The store that is not attacked.
        path: Of the rest.
    """

    whole: Path
    path: Path
    names: Iterator[int] = field(default_factory=itertools.count)

    @property
    def inside(self) -> Path:
        return self.path / "inside"

    @property
    def outside(self) -> Path:
        return self.path / "outside"

    def store(self) -> CheckpointStore:
        """Return a store to attack."""
        return CheckpointStore(str(shutil.copytree(self.whole, self.inside / str(next(self.names)))))


def contents(directory: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


# ---- what becomes of an attack

READ, DAMAGED, REFUSED = "read", "damaged", "refused"


def check_plain(state: object) -> None:
    """Check that something is data: exactly of a kind that does nothing."""
    if type(state) is Shard:
        state = [state.local, state.shape, state.index_ranges, state.sharding.placements, state.sharding.mesh]
    assert isinstance(state, np.generic | Manifest) or type(state) in (*LEAVES, *CONTAINERS), type(state)
    if isinstance(state, dict):
        state = [*state, *state.values()]
    if isinstance(state, list | tuple | set | frozenset):
        for part in state:
            check_plain(part)
    if type(state) is torch.Size or not isinstance(state, list | tuple | set | frozenset | torch.Tensor):
        repr(state)


def classify_outcome(read: Callable[[], object]) -> str:
    """Return whether something was read as plain data, or refused in words that can be printed."""
    try:
        check_plain(read())
    except CheckpointError as error:
        words, outcome = str(error), DAMAGED if isinstance(error, DamagedCheckpointError) else REFUSED
    else:
        return READ
    assert len(words) < 1000
    assert words.isprintable()
    return outcome


def read_all(store: CheckpointStore, manifest: Manifest) -> list[object]:
    return [dict(read_parts(store, manifest, name)) for name in (SHARED, rank_files(0))]


def visit(store: CheckpointStore) -> str:
    """Read the second checkpoint in every way, and return what became of it and which one is the newest."""
    newest, _ = store.newest()
    assert newest is not None
    assert store.manifests()[0].name == "step-1"
    assert classify_outcome(partial(CheckpointStore(store.directory, KEY).verify, "step-2")) != READ
    verified = classify_outcome(lambda: read_all(store, store.verify("step-2")))
    read = classify_outcome(lambda: read_all(store, store.manifest("step-2")))
    return f"{verified} {read} {newest.name}"


WHOLE = {f"{READ} {READ} step-2"}
FOUND_OUT = {f"{DAMAGED} {DAMAGED} step-1"}
NAMED = {f"{one} {two} step-{newest}" for one in (DAMAGED, REFUSED) for two in (DAMAGED, REFUSED) for newest in (1, 2)}


def check(arena: Arena, trials: Mapping[str, Trial], allowed: Collection[str]) -> None:
    """Check what becomes of trials, and that they leave the world as it was."""
    check_each(arena, {name: (trial, allowed) for name, trial in trials.items()})


def check_each(arena: Arena, trials: Mapping[str, tuple[Trial, Collection[str]]]) -> None:
    """Check what becomes of trials that each have outcomes of their own."""
    before = contents(arena.outside)
    outcomes = run_in_a_cell({name: trial for name, (trial, _) in trials.items()}, arena.inside)
    wrong = [f"{name} -> {outcomes[name]}" for name, (_, allowed) in trials.items() if outcomes[name] not in allowed]
    assert not wrong, "\n".join([f"{len(wrong)}, such as", *wrong[:5]])
    assert contents(arena.outside) == before


def check_replaced(arena: Arena, file: str, attacks: Mapping[str, Attack], resealed: Collection[str]) -> None:
    """Check what becomes of attacks on a file: with the manifest as it was, and with right hashes."""
    trials: dict[str, tuple[Trial, Collection[str]]] = {}
    for name, attack in attacks.items():
        for is_resealed in (False, True):
            store = arena.store()
            attack(Path(store.directory) / "step-2" / file)
            if is_resealed and file != MANIFEST:
                reseal(Path(store.directory) / "step-2")
            allowed = resealed if is_resealed else FOUND_OUT
            trials[f"{name}{', re-sealed' * is_resealed}"] = partial(visit, store), allowed
    check_each(arena, trials)
