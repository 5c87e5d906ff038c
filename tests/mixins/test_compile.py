"""Compiled models: equal numbers, parameter names of the original model, compiled during the run only."""

from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo import graph_break, reset
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    CheckpointMixin,
    CompileMixin,
    EMAMixin,
    GradAccumMixin,
    GradClipMixin,
    SeedMixin,
    StepOutput,
    StepResult,
    Steps,
    SyncBatchNormMixin,
    Trainer,
)
from ptacc.errors import CheckpointError, OptionError
from ptacc.protocols import CompileMode
from ptacc.storage.remote_store import open_store
from tests.ranks import run_ranks

pytestmark = [  # from dynamo and inductor
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace the builtin"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.norm(self.linear(inputs)).relu() + inputs
        return output


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(16, 4)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        output: Tensor = self.head(inputs)
        return output


class Plain(GradAccumMixin, GradClipMixin, SeedMixin, Trainer):
    seed: int | None = 3
    gradient_accumulation_steps: int = 2
    max_grad_norm: float | None = 0.5


class Compiled(CompileMixin, Plain): ...


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(44, 16, generator=generator), torch.randint(4, (44,), generator=generator))


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "loss_func": nn.CrossEntropyLoss(), "optimizer": optimizer, "default_callbacks": ()}


def trained(kind: type[Trainer], num_epochs: int = 2, **options: Any) -> tuple[list[Tensor], list[float]]:
    """Train and evaluate; return the weights, and the losses."""
    trainer = kind(**parts(), **options)
    history = trainer.train(
        data(), data(), num_epochs=num_epochs, per_device_batch_size=8 // trainer.distributed.world_size
    )
    result = trainer.evaluate(data(), per_device_batch_size=8)
    evaluated = [*(epoch.eval_loss or 0.0 for epoch in history), result.loss]
    return weights(trainer), [*(record.loss for record in history.steps), *evaluated]


def weights(trainer: Trainer) -> list[Tensor]:
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(this, that) for this, that in zip(these, those, strict=True))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("extra", [(), (AMPMixin,), (EMAMixin,), (SyncBatchNormMixin,)])
def test_tracing_alone_gives_equal_bits(extra: tuple[type, ...], regions: bool) -> None:
    options: dict[str, Any] = {"mixed_precision": "bf16"} if AMPMixin in extra else {}
    options |= {"ema_decay": 0.9} if EMAMixin in extra else {}
    compiled = type("Compiled", (*extra, Compiled), {})
    weights_compiled, losses = trained(compiled, compile_backend="eager", compile_regions=regions, **options)
    weights_plain, expected = trained(type("Plain", (*extra, Plain), {}), **options)
    assert losses == expected
    assert equal(weights_compiled, weights_plain)


def test_the_model_is_compiled_during_the_run_and_restored_after_it() -> None:
    recorded: list[str] = []

    class Looking(Compiled):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            recorded.append(type(self.model).__name__)
            return super().train_step(batch)

    trainer = Looking(**parts(), compile_backend="eager")
    reset()
    before = counters["frames"]["total"]
    trainer.train(data(), num_epochs=1)
    assert set(recorded) == {"OptimizedModule"}
    assert counters["frames"]["total"] > before
    assert type(trainer.model) is Net
    assert "forward" not in vars(trainer.model)


def test_forward_calls_the_wrapped_model() -> None:
    class Calling(CompileMixin, Trainer[Net]):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            assert self.forward is self.run.model is not self.unwrapped_model
            outputs = self.forward(batch[0])
            return StepOutput(loss=cross_entropy(outputs, batch[1]), outputs=outputs)

    trainer = Calling(**parts(), compile_backend="eager")
    assert len(trainer.train(data(), num_epochs=1)) == 1


def test_runs_and_evaluations_share_compiled_code_also_with_autocast() -> None:
    class Mixed(AMPMixin, Compiled): ...

    reset()
    trainer, graphs = Mixed(**parts(), mixed_precision="bf16", compile_backend="eager"), []
    for _ in range(4):
        trainer.train(data(), num_epochs=1, per_device_batch_size=8)
        trainer.evaluate(data(), per_device_batch_size=8)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert len(set(graphs[1:])) == 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_with_regions_each_block_is_compiled(precision: str) -> None:
    recorded: set[str] = set()

    class Looking(AMPMixin, Compiled):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            recorded.update(type(module).__name__ for module in self.model.get_submodule("blocks").children())
            return super().train_step(batch)

    trained(Looking, compile_backend="eager", compile_regions=True, mixed_precision=precision)
    assert recorded == {"OptimizedModule"}


def count_graphs(blocks: int) -> int:
    reset()
    counters.clear()
    model = Net(blocks)
    usual: dict[str, Any] = {**parts(), "model": model, "optimizer": SGD(model.parameters(), lr=0.1)}
    Compiled(**usual, compile_backend="eager", compile_regions=True).train(data(), num_epochs=1)
    return int(counters["stats"]["unique_graphs"])


def test_with_regions_more_blocks_need_no_more_graphs() -> None:
    assert 0 < count_graphs(9) == count_graphs(3)


def test_inductor_gives_equal_numbers_up_to_rounding() -> None:
    compiled, losses = trained(Compiled, num_epochs=1, compile_dynamic=True)
    plain, expected = trained(Plain, num_epochs=1)
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


class Saving(CheckpointMixin, EMAMixin, Compiled):
    ema_decay: float = 0.9
    compile_backend: Any = "eager"


@pytest.mark.parametrize("regions", [False, True])
def test_checkpoints_have_the_names_of_the_original_model_and_resume_exactly(tmp_path: Path, regions: bool) -> None:
    def train(directory: str, steps: int, **options: Any) -> Saving:
        trainer = Saving(**parts(), checkpoint_dir=tmp_path / directory, compile_regions=regions, **options)
        trainer.train(data(), num_epochs=2, max_steps=steps, per_device_batch_size=4)
        return trainer

    uninterrupted = train("whole", 11)
    train("run", 4, checkpoint_every=Steps(1))
    again = train("run", 11, resume=True)
    assert equal(weights(again), weights(uninterrupted))
    again.export_model(tmp_path / "ema.safetensors", averages="ema")
    exported = load_file(tmp_path / "ema.safetensors")
    assert [*sorted(exported)] == sorted(Net().state_dict())
    (name, *_) = open_store(tmp_path / "run").names()
    del again, uninterrupted
    with pytest.raises(CheckpointError, match=r"compiled was 'eager, default' and is 'aot_eager, default'"):
        train("run", 11, compile_backend="aot_eager", resume=tmp_path / "run" / name)


def losses_of_a_rank(backend: str, regions: bool) -> list[float]:
    options: dict[str, Any] = {"compile_backend": backend, "compile_regions": regions}
    return trained(Compiled if backend else Plain, **options if backend else {})[1]


@pytest.mark.parametrize("regions", [False, True])
def test_several_processes_train_as_without_it(regions: bool) -> None:
    assert run_ranks(losses_of_a_rank, 2, "eager", regions) == run_ranks(losses_of_a_rank, 2, "", regions)


def test_a_launch_may_name_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert Compiled(**parts()).resume_invariants()["compiled"] == "eager, default"
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as `accelerate launch` sets it
    assert Compiled(**parts()).resume_invariants()["compiled"] == "inductor, default"
    assert Compiled(**parts(), compile_backend="no").resume_invariants()["compiled"] == "no, default"


@pytest.mark.parametrize("name", ["compile_backend", "compile_mode"])
def test_an_invalid_choice_is_refused(name: str) -> None:
    options: dict[str, Any] = {name: "fast"}
    with pytest.raises(OptionError, match=rf"Compiled\({name}='fast'\): must be one of "):
        Compiled(**parts(), **options)


@pytest.mark.parametrize(
    "options",
    [{"compile_mode": "reduce-overhead"}, {"compile_mode": "max-autotune"}, {"compile_backend": "cudagraphs"}],
)
def test_cuda_graphs_with_accumulation_are_refused(options: dict[str, Any]) -> None:
    trainer = Compiled(**parts(), **options)
    with pytest.raises(OptionError, match=r"uses CUDA graphs.* it has 2 batches per step"):
        trainer.train(data(), num_epochs=1)
    assert type(trainer.model) is Net


def test_a_launch_may_not_set_cuda_graphs_with_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    with pytest.raises(OptionError, match="uses CUDA graphs"):
        Compiled(**parts(), compile_backend="eager").train(data(), num_epochs=1)


@pytest.mark.parametrize(("mode", "is_copied"), [("reduce-overhead", True), ("max-autotune-no-cudagraphs", False)])
def test_losses_in_the_memory_of_a_cuda_graph_are_copied(mode: CompileMode, is_copied: bool) -> None:
    class Watching(CompileMixin, Trainer):
        losses: list[int] = field(init=False, default_factory=list)

        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            output = super().train_step(batch)
            self.losses.append(output.loss.data_ptr())
            return output

        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            assert (step.loss.data_ptr() != self.losses[-1]) is is_copied

    trainer = Watching(**parts(), compile_backend="eager", compile_mode=mode)
    trainer.train(data(), num_epochs=1)
    assert trainer.losses


def test_a_graph_break_is_an_error_with_fullgraph() -> None:
    class Broken(Net):
        @override
        def forward(self, inputs: Tensor) -> Tensor:
            graph_break()
            return super().forward(inputs)

    torch.manual_seed(0)
    model = Broken()
    usual: dict[str, Any] = {**parts(), "model": model, "optimizer": SGD(model.parameters(), lr=0.1)}
    with pytest.raises(Unsupported):
        Compiled(**usual, compile_backend="eager", compile_fullgraph=True).train(data(), num_epochs=1)
