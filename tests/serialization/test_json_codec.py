"""What goes into a checkpoint comes back equal, to the last bit and the last type; what cannot is refused by name."""

import json
from collections import Counter, OrderedDict, defaultdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.serialization.json_codec import MAX_DEPTH, Encoded, decode, encode

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.device("cpu"), torch.device("cuda", 1)]),
)
keys = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.just("~"), st.none())
states = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.dictionaries(st.text(), inner).map(OrderedDict),
        st.dictionaries(st.tuples(keys, keys), inner),
    ),
    max_leaves=12,
)


def through_files(state: object) -> Any:
    """Encode a state, write its tree as JSON, and read it back."""
    encoded = encode(state)
    return decode(Encoded(json.loads(json.dumps(encoded.tree)), encoded.tensors))


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, np.ndarray | np.generic):
        return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, dict):
        return len(left) == len(right) and all(map(same, left, right)) and all(map(same, left.values(), right.values()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, float):
        return repr(left) == repr(right)
    return bool(left == right)


@given(states)
def test_every_state_comes_back_as_it_was(state: object) -> None:
    assert same(through_files(state), state)


@pytest.mark.parametrize(
    "state",
    [
        Counter({3: 2, "a": 1}),
        {1, 2, 3},
        frozenset({"a", "b"}),
        torch.Size([2, 3]),
        {True: 1, "1": 2, 1.5: 3, None: 4, (1, "a"): 5},
        torch.randn(3, 4).t(),
        torch.zeros((), dtype=torch.complex64),
        torch.zeros(0, 3, dtype=torch.bool),
        torch.tensor([1, 65535], dtype=torch.uint16),
        np.random.default_rng(0).integers(0, 2**32, 624, dtype=np.uint32),
        np.array(3.5, dtype=np.float16),
        np.ones((2, 0, 3), dtype=">i4"),
        np.float32(0.1),
        np.bool_(True),
    ],
    ids=lambda state: type(state).__name__,
)
def test_what_states_are_made_of_comes_back(state: object) -> None:
    assert same(through_files(state), state)


def test_random_states_come_back() -> None:
    import random

    for state in (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()):  # noqa: NPY002
        assert same(through_files(state), state)


def test_a_tensor_that_is_met_twice_is_stored_once() -> None:
    weight = torch.randn(4)
    encoded = encode({"embedding": weight, "head": weight, "part": weight[:2]})
    assert len(encoded.tensors) == 2
    back = decode(encoded)
    assert back["embedding"] is back["head"]


class Own(dict[str, int]):
    pass


deep: list[Any] = []
deep.append(deep)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"schedule": {"factor": lambda step: step}},
            r"\['schedule'\]\['factor'\] is a builtins.function",
        ),
        ([1, Fraction(1, 3)], r"state\[1\] is a fractions.Fraction"),
        (Own(), "Own, which cannot be stored"),
        (defaultdict(int), "collections.defaultdict"),
        (deep, f"nested more than {MAX_DEPTH} deep"),
        (np.array([None]), "numpy.ndarray"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.empty(2, device="meta"), "without data"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_place(state: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encode(state)


@pytest.mark.parametrize(
    "tree",
    [
        {"~": "pickle", "value": "gASVDgAAAAAAAACMAm9zlIwGc3lzdGVtlJOULg=="},
        {"~": ["tensor"]},
        {"~": "tensor", "key": "unknown"},
        {"~": "tensor"},
        {"~": "bytes", "value": "not base64!"},
        {"~": "dtype", "value": "os"},
        {"~": "device", "value": "moon"},
        {"~": "float", "value": "1e5"},
        {"~": "dict", "items": 3},
        {"~": "dict", "items": [[[], 1]]},
        {"~": "set", "items": [[1]]},
        {"~": "Counter", "items": [[1, 2, 3]]},
        {"~": "Size", "items": ["two"]},
        {"~": "array", "key": "bytes", "dtype": "O", "shape": [1]},
        {"~": "array", "key": "bytes", "dtype": "<f8", "shape": [10**9, 10**9]},
        {"~": "array", "key": "bytes", "dtype": "not a dtype", "shape": [1]},
        json.loads("[" * 400 + "]" * 400),
    ],
    ids=lambda tree: json.dumps(tree)[:40],
)
def test_what_was_never_encoded_is_damage(tree: Any) -> None:
    with pytest.raises(DamagedCheckpointError):
        decode(Encoded(tree, {"bytes": torch.zeros(8, dtype=torch.uint8)}))


def test_a_malformed_value_is_reported_with_its_error() -> None:
    with pytest.raises(DamagedCheckpointError, match=r"malformed 'device' value: RuntimeError: .*device.*"):
        decode(Encoded({"~": "device", "value": "moon"}, {}))
