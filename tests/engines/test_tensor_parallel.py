"""Tensor parallelism, alone and with FSDP2: the losses of one process, and errors."""

import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, FSDPMixin, MetricsMixin, StepOutput, Steps, TensorParallelMixin
from ptacc.engines.sharded import move_unsharded
from ptacc.errors import DataError, LaunchError, OptionError, PtaccError
from ptacc.protocols import Engine
from ptacc.rng import seed_everything
from ptacc.tensors.dtensor import is_dtensor
from tests.engines.nets import SPLIT, Averaging, PairNet, Usual, check_equal, digits, make_pairs, train
from tests.ranks import run_ranks

PLAN: Mapping[str, Any] = {**SPLIT, "leave": "colwise_gather_output"}


class Split(TensorParallelMixin, Usual):
    tensor_parallel_plan: Mapping[str, Any] | None = field(default_factory=lambda: PLAN)


class Both(FSDPMixin, Split):
    tensor_parallel_size: int | None = 2


@pytest.mark.parametrize(("kind", "processes"), [(Split, 2), (Both, 4)])
def test_the_numbers_are_those_of_one_process(kind: type[Usual], processes: int) -> None:
    expected = train(Usual, make_model=make_pairs, optimizer="sgd")
    check_equal(run_ranks(lambda: train(kind, make_model=make_pairs, optimizer="sgd"), processes), expected)


class SplitAveraging(TensorParallelMixin, Averaging): ...


class BothAveraging(FSDPMixin, SplitAveraging): ...


@pytest.mark.parametrize(("kind", "processes"), [(SplitAveraging, 2), (BothAveraging, 4)])
def test_averages_and_batch_norm_are_those_of_replicas(kind: type[Usual], processes: int) -> None:
    replicas = processes // 2
    expected = run_ranks(lambda: train(Averaging, make_model=make_pairs, has_batch_norm=True), replicas)
    options: dict[str, Any] = {"tensor_parallel_size": 2, "tensor_parallel_plan": PLAN, "has_batch_norm": True}
    check_equal(run_ranks(lambda: train(kind, make_model=make_pairs, **options), processes), expected[0])


# ---- fp16


def scale(trainer: Usual, engine: Any, overflows_at: int) -> Engine:
    """Add a gradient scaler on the CPU. At one step, a gradient of a split layer overflows on rank 1 at first."""
    engine._new_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # noqa: SLF001
    unscale = engine.unscale_gradients

    def overflow_and_unscale() -> None:
        progress = trainer.progress
        if (progress.steps + 1, progress.skipped, torch.distributed.get_rank()) == (overflows_at, 0, 1):
            weight: Any = trainer.unwrapped_model.get_parameter("blocks.0.up.weight")
            weight.grad.to_local()[0] = math.inf
        unscale()

    engine.unscale_gradients = overflow_and_unscale
    return cast(Engine, engine)


class SplitScaled(Split):
    overflows_at: int = 0

    @override
    def make_engine(self) -> Engine:
        return scale(self, super().make_engine(), self.overflows_at)


class BothScaled(Both):
    overflows_at: int = 0

    @override
    def make_engine(self) -> Engine:
        return scale(self, super().make_engine(), self.overflows_at)


def test_losses_may_be_scaled_with_layers_that_are_not_split() -> None:
    expected = train(Usual, make_model=make_pairs, optimizer="sgd")
    check_equal(run_ranks(lambda: train(SplitScaled, make_model=make_pairs, optimizer="sgd"), 2), expected)


@pytest.mark.parametrize(("kind", "processes"), [(SplitScaled, 2), (BothScaled, 4)])
def test_all_ranks_skip_a_step_that_overflows_on_one(kind: type[Any], processes: int) -> None:
    def skip() -> tuple[int, int, list[float]]:
        trainer = kind(**parts(make_pairs()), overflows_at=3, gradient_accumulation_steps=1)
        history = trainer.train(digits(), num_epochs=1, max_steps=6, per_device_batch_size=4)
        return trainer.progress.steps, trainer.progress.skipped, [step.loss for step in history.steps]

    first, *others = run_ranks(skip, processes)
    assert first[:2] == (6, 1)
    assert all(other == first for other in others)


# ---- devices and process groups


def test_tensors_outside_of_the_plan_are_moved_and_stay_the_same_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pairs(has_batch_norm=True)
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    monkeypatch.setattr(Tensor, "to", lambda tensor, device: tensor * 2)  # stands for a copy on another device
    move_unsharded(model, torch.device("cpu"))
    after = (*model.parameters(), *model.buffers())
    assert all(new is old and torch.equal(new, 2 * value) for new, (old, value) in zip(after, before, strict=True))


def count_groups_of_runs() -> list[int]:
    trainer = Both(**parts(make_pairs()), tensor_parallel_size=2, fsdp_wrap=[])
    counts = []
    for _ in range(3):
        trainer.train(digits(), max_steps=1, per_device_batch_size=4)
        counts.append(len(torch.distributed.distributed_c10d._world.pg_map))  # noqa: SLF001
    return counts


def test_runs_share_the_process_groups_of_their_mesh() -> None:
    for counts in run_ranks(count_groups_of_runs, 4):
        assert len(set(counts)) == 1, counts


# ---- what counts once


def parts(model: nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loss_func": nn.CrossEntropyLoss(),
        "default_callbacks": (),
    }


class Seen(Metric):
    """Adds up how many samples it was given."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.seen += len(targets)

    @override
    def compute(self) -> Tensor:
        return self.seen


class Weighing(MetricsMixin, Split):
    """Counts items that are not samples, and metrics that add up."""

    @override
    def count_items(self, batch: tuple[Tensor, Tensor]) -> int:
        return int((1 + batch[1]).sum())

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        outputs = self.model(batch[0])
        losses = (1 + batch[1]) * cross_entropy(outputs, batch[1], reduction="none")
        return StepOutput.from_sum(losses.sum(), outputs=outputs)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        return self.train_step(batch)


class WeighingBoth(FSDPMixin, Weighing): ...


def counts(kind: type[Weighing]) -> list[float]:
    options: dict[str, Any] = {"seed": 2, "gradient_accumulation_steps": 1, "tensor_parallel_size": 2}
    metrics = {"seen": Seen(), "accuracy": MulticlassAccuracy(10)}
    trainer = kind(
        **{**parts(make_pairs()), **options}, metrics=metrics, train_metrics={"accuracy": MulticlassAccuracy(10)}
    )
    size = 8 // trainer.distributed.replicas
    history = trainer.train(digits(101), digits(37), num_epochs=2, per_device_batch_size=size)
    evaluated = trainer.evaluate(digits(37), per_device_batch_size=size)
    predicted = trainer.predict(digits(37), per_device_batch_size=size)
    loaded = trainer.train(DataLoader(digits(64), batch_size=size), num_epochs=1)
    streamed = trainer.train(Stream(), max_steps=3, per_device_batch_size=size)
    return [
        *(number for run in (history, loaded, streamed) for step in run.steps for number in (step.loss, step.items)),
        *(number for epoch in history for number in (epoch.items, *epoch.values().values())),
        evaluated.loss,
        *evaluated.metrics.values(),
        len(predicted),
        float(torch.stack(list(predicted)).square().sum()),
    ]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = digits(50).tensors
        yield from zip(inputs, targets, strict=True)


@pytest.mark.parametrize(("kind", "processes"), [(Weighing, 2), (WeighingBoth, 4)])
def test_a_batch_shared_by_a_replica_counts_once(kind: type[Weighing], processes: int) -> None:
    expected = counts(Weighing)
    for numbers in run_ranks(lambda: counts(kind), processes):
        assert numbers == pytest.approx(expected, rel=1e-4)


# ---- the model


def draws_alike(kind: type[Usual]) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(3)
    model = PairNet(dropout=0.5)
    seed_everything(os.getpid())
    trainer = kind(**parts(model), seed=None)
    held: dict[str, Tensor] = {}

    class Observing(Callback[Usual]):
        @override
        def on_run_end(self, trainer: Usual) -> None:
            held.update({name: p.detach().clone() for name, p in model.named_parameters() if not is_dtensor(p)})

    trainer.callbacks = [Observing()]
    history = trainer.train(digits(101), num_epochs=1, per_device_batch_size=8)
    return [step.loss for step in history.steps], held


def test_the_ranks_of_a_replica_draw_the_same_numbers() -> None:
    (losses, held), (others, theirs) = run_ranks(lambda: draws_alike(Split), 2)
    assert losses == others
    assert "enter.weight" in held
    assert all(torch.equal(held[name], theirs[name]) for name in held)


def shards_and_restores(kind: type[Usual]) -> tuple[list[str], float]:
    model = make_pairs()
    before, looks = [id(p) for p in model.parameters()], [set(vars(module)) for module in model.modules()]
    held: list[float] = []

    class Observing(Callback[Usual]):
        @override
        def on_run_start(self, trainer: Usual) -> None:
            up = model.blocks[0].get_submodule("up").weight
            held.append(up.to_local().numel() / (33 * 48) if is_dtensor(up) else 1.0)

    kind(**parts(model), callbacks=[Observing()]).train(digits(), num_epochs=1, max_steps=2)
    assert [id(p) for p in model.parameters()] == before
    assert [set(vars(module)) for module in model.modules()] == looks
    assert torch.equal(pickle.loads(pickle.dumps(model))(torch.ones(2, 64)), model(torch.ones(2, 64)))
    return [type(p).__name__ for p in model.parameters()], held[0]


@pytest.mark.parametrize(("kind", "processes"), [(Split, 1), (Split, 2), (Both, 4)])
def test_the_users_model_is_split_and_restored(kind: type[Usual], processes: int) -> None:
    for types, share in run_ranks(lambda: shards_and_restores(kind), processes):
        assert set(types) == {"Parameter"}
        assert share == pytest.approx(1 / processes, rel=0.1)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_optimizers_step_split_and_unsplit_parameters_together(optimizer: Any) -> None:
    def losses() -> list[float]:
        model = make_pairs()
        one = {**parts(model), "optimizer": optimizer(model.parameters(), lr=0.01, foreach=True)}
        history = Split(**one, max_grad_value=0.01).train(digits(101), num_epochs=1)
        return [step.loss for step in history.steps]

    expected = losses()
    for numbers in run_ranks(losses, 2):
        assert numbers == pytest.approx(expected, rel=1e-4)


# ---- checkpoints


class Saving(CheckpointMixin, Split):
    tensor_parallel_size: int | None = 2


class SavingBoth(FSDPMixin, Saving): ...


def go(kind: type[Saving], directory: Path, steps: int, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    model = make_pairs()
    trainer = kind(**parts(model), checkpoint_dir=directory, checkpoint_every=Steps(2), **options)
    size = 12 // trainer.distributed.replicas
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The run resumes with")
        history = trainer.train(digits(200), digits(70), num_epochs=2, max_steps=steps, per_device_batch_size=size)
    trainer.export_model(directory / "model.safetensors", overwrite=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = trainer.optimizer.state_dict()["state"]
    return [step.loss for step in history.steps], tensors | {
        f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()
    }


@pytest.mark.parametrize(("kind", "processes"), [(Saving, 2), (SavingBoth, 4)])
@pytest.mark.parametrize("interrupted_after", [5, pytest.param(8, marks=pytest.mark.prove)])
def test_a_run_resumes_to_the_last_bit(
    tmp_path: Path, kind: type[Saving], processes: int, interrupted_after: int
) -> None:
    whole = run_ranks(lambda: go(kind, tmp_path / "whole", 9), processes)
    run_ranks(lambda: go(kind, tmp_path / "run", interrupted_after), processes)
    again = run_ranks(lambda: go(kind, tmp_path / "run", 9, resume=True), processes)
    for (losses, tensors), (expected, theirs) in zip(again, whole, strict=True):
        assert losses == expected
        assert all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in whole[0][1].items() if name in exported)
    assert exported.keys() == make_pairs().state_dict().keys()


@pytest.mark.parametrize(("kind", "before", "after"), [(Saving, 2, 1), (Saving, 1, 2), (SavingBoth, 4, 2)])
def test_a_run_resumes_with_another_number_of_ranks(
    tmp_path: Path, kind: type[Saving], before: int, after: int
) -> None:
    (losses, tensors), *_ = run_ranks(lambda: go(kind, tmp_path / "whole", 9), before)
    run_ranks(lambda: go(kind, tmp_path / "run", 5), before)
    (again, mine), *_ = run_ranks(lambda: go(kind, tmp_path / "run", 9, resume=True), after)
    assert again == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(mine, tensors, rtol=1e-3, atol=1e-4)


# ---- plans


def llama(kind: type[Usual]) -> list[float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Llama(kind):  # type: ignore[misc, valid-type]  # a class that is made of one that is given
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            tokens = (batch[0][:, :16] * 16).long()
            logits = self.model(tokens).logits
            return StepOutput(self.loss_func(logits[:, -1], batch[1]), outputs=logits[:, -1])

        @override
        def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            return self.train_step(batch)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    trainer = Llama(**parts(LlamaForCausalLM(config)), seed=1)
    size = 12 // trainer.distributed.replicas
    history = trainer.train(digits(60), digits(24), num_epochs=1, per_device_batch_size=size)
    return [*(step.loss for step in history.steps), history[-1].eval_loss or 0.0]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_model_of_transformers_has_a_plan(processes: int) -> None:
    class WithPlan(FSDPMixin, TensorParallelMixin, Usual):
        tensor_parallel_size: int | None = 2

    expected = llama(Usual)
    for numbers in run_ranks(lambda: llama(WithPlan), processes):
        assert numbers == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0"),
        ({"tensor_parallel_plan": ["blocks.*.up"]}, "must be a mapping from names of submodules"),
        ({"tensor_parallel_plan": {"leave": "colwize"}}, r"\{'leave': 'colwize'\}\): must be one of colwise"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Split(**parts(make_pairs()), **options)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(64, 10), nn.Linear(10, 64, bias=False)
        self.head.weight = self.tokens.weight


def error_message(kind: type[Usual], options: dict[str, Any], model: nn.Module | None = None) -> str:
    trainer = kind(**parts(model or make_pairs()), **options)
    with pytest.raises(PtaccError) as caught:
        trainer.train(digits(64), num_epochs=1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"block.*.up": "colwise"}, "PairNet calls no submodule that has the name 'block.*.up'. Did you mean"),
        ({"blocks.0.norm": "colwise"}, "blocks.0.norm is a LayerNorm, and 'colwise' splits a Linear"),
        ({"enter": "embedding_rowwise"}, "enter is a Linear, and 'embedding_rowwise' splits a Embedding"),
        (None, "PairNet has no plan of its own"),
    ],
)
def test_an_invalid_plan_raises_on_one_process_as_well(plan: Any, message: str) -> None:
    assert message in error_message(Split, {"tensor_parallel_plan": plan})


def test_what_cannot_be_split_raises() -> None:
    assert (
        "enter has 33 rows, which 2 processes cannot share evenly"
        in run_ranks(error_message, 2, Split, {"tensor_parallel_plan": {"enter": "colwise"}})[0]
    )
    plan = {"head": "colwise_gather_output"}
    assert "head shares a parameter with another module" in error_message(Split, {"tensor_parallel_plan": plan}, Tied())
    for said in run_ranks(error_message, 4, Split, {"tensor_parallel_size": 2}, timeout=40):
        assert "2 replicas, and no mixin shards those. Compose FSDPMixin" in said
    for said in run_ranks(error_message, 3, Split, {"tensor_parallel_size": 2}):
        assert "share each replica of the model, but 3 were launched" in said


def test_sharded_data_raises() -> None:
    def trains() -> str:
        with pytest.raises(DataError) as caught:
            Split(**parts(make_pairs())).train(digits(64), num_epochs=1, data_is_sharded=True)
        return str(caught.value)

    for said in run_ranks(trains, 2):
        assert "2 processes share a replica of the model and need the same batches" in said


def test_the_launch_sets_the_size_of_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    sizes = run_ranks(lambda: Both(**parts(make_pairs()), tensor_parallel_size=None).distributed.replicas, 4)
    assert sizes == [2, 2, 2, 2]
    with pytest.raises(LaunchError, match=r"asks for a tensor parallel size of 2, and Split was given .*_size=4"):
        _ = Split(**parts(make_pairs()), tensor_parallel_size=4).distributed
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    for said in run_ranks(error_message, 4, Both, {"tensor_parallel_size": None}):
        assert "asks for a dp_shard_size of 4, but 4 processes with 2 per replica give 2" in said
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(LaunchError, match="PARALLELISM_CONFIG_CP_SIZE=2, and Split does not support it"):
        _ = Split(**parts(make_pairs())).distributed
