"""Every engine, on several processes, has the losses of one at the same global batch: 20 steps in float32.

A step is a ragged window of two batches on each process, with clipped gradients. The largest difference of a loss is
in the report:

    python -m pytest tests/engines/test_numbers.py -o junit_family=xunit1 --junit-xml=numbers.xml
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from ptacc import DeepSpeedMixin, FSDPMixin, Steps, TensorParallelMixin
from tests.engines.nets import GLOBAL_BATCH, SPLIT, STEPS, Usual, check_equal, digits, make, make_pairs, train
from tests.marks import DEEPSPEED
from tests.ranks import run_ranks

pytestmark = DEEPSPEED
prove = pytest.mark.prove


class Sharded(FSDPMixin, Usual): ...


class Split(TensorParallelMixin, Usual): ...


class Deep(DeepSpeedMixin, Usual): ...


@dataclass(frozen=True)
class Engine:
    """What processes run.

    Args:
        kind: The trainer.
        options: What it is given, and a single process is not.
        make_model: Makes the net, for both.
        rtol: Relative tolerance of the other numbers. If a layer's sums are split, activations are rounded
            differently, and Adam amplifies the difference for gradients near zero.
    """

    kind: type[Usual]
    options: Mapping[str, Any] = field(default_factory=dict)
    make_model: Callable[..., nn.Module] = make
    rtol: float = 1e-5


ENGINES: Mapping[str, Engine] = {
    "ddp": Engine(Usual),
    "fsdp": Engine(Sharded),
    "tensor parallel": Engine(Split, {"tensor_parallel_plan": SPLIT}, make_pairs, rtol=1e-4),
    **{f"zero {stage}": Engine(Deep, {"zero_stage": stage}) for stage in (0, 1, 2, 3)},
}


def test_a_step_is_ragged_in_float32_and_clipped() -> None:
    alone = train(Usual)
    assert len(digits()) % GLOBAL_BATCH % 2 == 1
    assert {parameter.dtype for parameter in make().parameters()} == {torch.float32}
    assert all(norm > (Usual.max_grad_norm or 0.0) for norm in alone.norms)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=prove)])
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=prove)])
def test_the_losses_are_those_of_one_process(
    name: str, optimizer: str, processes: int, record_property: Callable[[str, object], None]
) -> None:
    engine = ENGINES[name]
    options: dict[str, Any] = {"make_model": engine.make_model, "optimizer": optimizer}
    alone = train(Usual, **options)
    numbers = run_ranks(lambda: train(engine.kind, **options, **engine.options), processes)
    assert [len(one.losses) for one in (alone, *numbers)] == [STEPS] * (1 + processes)
    differences = [abs(mine - its) for one in numbers for mine, its in zip(one.losses, alone.losses, strict=True)]
    record_property("largest difference of a loss", max(differences))
    assert max(differences) <= 1e-5
    check_equal(numbers, alone, rtol=engine.rtol)


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", "zero 2", *(pytest.param(name, marks=prove) for name in ("tensor parallel", "zero 3"))]
)
def test_the_number_of_batches_per_step_may_change(name: str) -> None:
    engine = ENGINES[name]
    options: dict[str, Any] = {"make_model": engine.make_model, "accumulation_schedule": {Steps(4): 1, Steps(9): 3}}
    alone = train(Usual, **options)
    numbers = run_ranks(lambda: train(engine.kind, **options, **engine.options), 2)
    check_equal(numbers, alone, rtol=engine.rtol)
