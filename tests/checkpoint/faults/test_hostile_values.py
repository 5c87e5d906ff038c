"""Whatever stands in a state or in a manifest, reading it gives plain data or a named error."""

import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from typing_extensions import override

from ptacc.checkpoint.parts import SHARED, read_parts
from ptacc.checkpoint.retention import Retention
from ptacc.files.filesystem import FileDigest
from ptacc.storage.manifest import FILE_NAME, Manifest
from ptacc.storage.store import MANIFEST, CheckpointStore
from ptacc.types.monitor import Best
from tests.checkpoint.faults import payloads
from tests.checkpoint.faults.arenas import (
    DAMAGED,
    NAMED,
    READ,
    REFUSED,
    Arena,
    check,
    classify_outcome,
    visit,
)
from tests.checkpoint.faults.payloads import read_content, sealed, spoiled


@dataclass(frozen=True)
class Handed(CheckpointStore):
    """A store whose files have right hashes, whatever is in them."""

    tree: bytes = b""

    @override
    def read(self, manifest: Manifest, file: str) -> bytes:
        if file.endswith("json"):
            return self.tree
        return payloads.TENSORS


FILED = Manifest(
    "step-2", "", 1, 1, 1, 1, files={f"shared.{kind}": FileDigest("", 1) for kind in ("json", "safetensors")}
)


def read_tree(tree: str) -> str:
    """Return what becomes of a file of parts."""
    return classify_outcome(lambda: dict(read_parts(Handed("", tree=tree.encode()), FILED, SHARED)))


@pytest.mark.parametrize("whole", payloads.TAGGED, ids=lambda whole: whole["~"])
def test_a_state_of_any_values_is_data_or_damage(whole: object, arena: Arena) -> None:
    states = [json.dumps(state) for state in spoiled(whole)]
    trials = {
        f"{number}: {within % state:.200}": partial(read_tree, within % state)
        for number, state in enumerate(states)
        for within in payloads.WITHIN
    }
    check(arena, trials, {READ, DAMAGED})


def read_deep(within: str, opening: str, closing: str, depth: int) -> str:
    return read_tree(within % (opening * depth + "1" + closing * depth))


@pytest.mark.parametrize(
    ("depths", "outcomes"),
    [([60, 64, 100, 150, 190], {READ, DAMAGED}), ([250, 480, 700, *range(900, 1000, 10), payloads.DEEP], {DAMAGED})],
)
def test_deep_states_are_data_or_damage(depths: list[int], outcomes: set[str], arena: Arena) -> None:
    trials = {
        f"{depth} {opening}{closing} in {within}": partial(read_deep, within, opening, closing, depth)
        for depth in depths
        for opening, closing in payloads.BRACKETS
        for within in payloads.WITHIN
    }
    check(arena, trials, outcomes)


def test_a_state_that_is_read_from_deep_within_is_damage() -> None:
    def calling(calls: int) -> str:
        return calling(calls - 1) if calls else read_tree('{"model": %s1%s}' % ("[" * 180, "]" * 180))  # noqa: UP031

    assert calling(0) == READ
    assert calling(sys.getrecursionlimit() - len([*traceback.walk_stack(None)]) - 250) == DAMAGED


def test_what_json_allows_is_data_or_damage(arena: Arena) -> None:
    trials = {f"{text:.40}": partial(read_tree, payloads.WITHIN[0] % text) for text in payloads.TEXTS}
    check(arena, trials, {READ, DAMAGED})


def read_manifest(store: CheckpointStore, content: object, others: Mapping[str, object] | None = None) -> str:
    """Return what becomes of a manifest, which is used for all that manifests are."""

    def read() -> Manifest:
        found = Manifest.from_bytes(sealed(content, others=others))
        Retention(last=1, best=Best("loss")).removable([found, FILED])
        for file, written in found.files.items():
            assert isinstance(written.sha256, str)
            classify_outcome(partial(store.read, found, file))
        return found

    return classify_outcome(read)


def test_a_manifest_of_any_values_is_one_or_damage(arena: Arena) -> None:
    read, content = partial(read_manifest, arena.store()), read_content(arena.whole / "step-2")
    trials = {f"{number}: {other!r:.3000}": partial(read, other) for number, other in enumerate(spoiled(content))}
    for number, value in enumerate(payloads.VALUES):
        trials[f"more {number}: {value!r:.200}"] = partial(read, content, {"more": value})
        trials[f"hmac {number}: {value!r:.200}"] = partial(read, content, {"hmac": value})
    check(arena, trials, {READ, DAMAGED, REFUSED})


NO_NAMES = [value for value in payloads.VALUES if isinstance(value, str) and not FILE_NAME.fullmatch(value)]


def test_a_name_in_a_manifest_leads_nowhere_else(arena: Arena) -> None:
    trials = {}
    secret = payloads.described(arena.outside / "secret")
    for text in (*NO_NAMES, str(arena.outside / "secret")):
        for which in ("name", "files"):
            store = arena.store()
            content = read_content(Path(store.directory) / "step-2")
            content[which] = text if which == "name" else content["files"] | {text: secret}
            (Path(store.directory) / "step-2" / MANIFEST).write_bytes(sealed(content))
            trials[f"{which}: {text:.200}"] = partial(visit, store)
    check(arena, trials, NAMED)
