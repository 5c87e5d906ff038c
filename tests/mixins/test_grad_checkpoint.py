"""Recomputing activations stores fewer of them; everything else is equal to the bit."""

import copy
import pickle
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    AMPMixin,
    CompileMixin,
    GradAccumMixin,
    GradCheckpointMixin,
    Pair,
    SeedMixin,
    StepOutput,
    StepResult,
    SWAMixin,
    SyncBatchNormMixin,
    Trainer,
    TrainingLoop,
)
from ptacc.errors import ModelError, OptionError
from ptacc.model.selection import select_submodules
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

Choices = Sequence[type[nn.Module] | str]


class Block(nn.Module):
    """A residual block with dropout and running statistics, which a second forward could change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 8))

    @override
    def forward(self, inputs: Tensor, *, scale: Tensor | float = 1.0) -> Tensor:
        outputs: Tensor = inputs + scale * self.inner(inputs)
        return outputs


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden, scale=torch.sigmoid(hidden))
        outputs: Tensor = self.last(hidden)
        return outputs


class Checkpointed(GradCheckpointMixin, SeedMixin, GradAccumMixin, AMPMixin, Trainer):
    seed: int | None = 3


class SyncFirst(SyncBatchNormMixin, Checkpointed): ...


class SyncLast(GradCheckpointMixin, SeedMixin, SyncBatchNormMixin, Trainer):
    seed: int | None = 3


def make_parts(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Network().to(dtype)
    return {**tiny_parts(), "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def train(
    choices: Choices,
    trainer_class: type[Checkpointed] | type[SyncLast] = Checkpointed,
    *,
    samples: int = 28,
    **options: Any,
) -> dict[str, Tensor]:
    """Train in batches of 4, and return the loss of each step, the weights and the running statistics."""
    dtype = torch.float32 if "mixed_precision" in options else torch.float64
    trainer = trainer_class(**make_parts(dtype), gradient_checkpointing=choices, **options)
    inputs, targets = tiny_data(samples).tensors
    data = TensorDataset(inputs.to(dtype), targets)
    history = trainer.train(data, data, num_epochs=2, per_device_batch_size=4)
    assert not any("forward" in vars(module) for module in trainer.model.modules())
    losses = [*(step.loss for step in history.steps), history[-1].eval_loss or 0.0]
    return {"losses": torch.tensor(losses, dtype=torch.float64), **trainer.model.state_dict()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# ---- equal to the bit


@pytest.mark.parametrize("choices", [[Block], ["blocks.*"], ["blocks.1", nn.Linear], [nn.BatchNorm1d, "*.inner"]])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}])
def test_losses_weights_and_statistics_are_the_same_to_the_last_bit(choices: Choices, options: dict[str, Any]) -> None:
    assert_same(train(choices, **options), train((), **options))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}])
def test_they_are_equal_on_two_processes(options: dict[str, Any]) -> None:
    for found, wanted in run_ranks(lambda: (train([Block], **options), train((), **options)), 2):
        assert_same(found, wanted)


def train_synced(choices: Choices, samples: int) -> list[dict[str, Tensor]]:
    plain = train((), SyncLast, samples=samples)
    return [plain, train(choices, SyncLast, samples=samples), train(choices, SyncFirst, samples=samples)]


# On 3 processes, the last of 26 samples leave one rank without data. It still takes part in each all-reduce.
@pytest.mark.parametrize(("world_size", "samples"), [(2, 28), (3, 26)])
@pytest.mark.parametrize("choices", [[Block], ["blocks.1", nn.BatchNorm1d]])
def test_they_are_equal_with_synchronised_batch_norm_in_either_order(
    choices: Choices, world_size: int, samples: int
) -> None:
    for plain, *others in run_ranks(train_synced, world_size, choices, samples):
        for other in others:
            assert_same(other, plain)


def test_they_are_equal_with_averaged_weights() -> None:
    class Averaged(SWAMixin, Checkpointed):
        swa_start: int | None = 1

    assert_same(train([Block], Averaged), train((), Averaged))


# ---- stored activations


class Weighed(Checkpointed):
    """Counts the elements that the forward of a step stores for the backward, without the parameters."""

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        own = {parameter.data_ptr() for parameter in self.model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                stored.append(tensor.numel())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            return super().train_step(batch)


stored: list[int] = []


def count_stored(choices: Choices) -> int:
    stored.clear()
    train(choices, Weighed)
    return sum(stored)


def test_fewer_activations_are_stored() -> None:
    every, one, none = count_stored([Block]), count_stored(["blocks.1"]), count_stored(())
    assert every < one < none
    # 32 wide inside the blocks, 8 wide between them.
    assert every < none / 4


class Calls(Checkpointed):
    """Counts the forward passes of the blocks, including those in the backward pass."""

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        for block in self.unwrapped_model.get_submodule("blocks").children():
            block.get_submodule("inner").register_forward_pre_hook(lambda module, _: calls.append(module.training))


calls: list[bool] = []


@pytest.mark.parametrize(("choices", "passes"), [((), 1), ([Block], 2), ([Block, nn.Sequential, "blocks.*"], 2)])
def test_the_forward_is_repeated_once_and_in_training_only(choices: Choices, passes: int) -> None:
    calls.clear()
    train(choices, Calls)
    batches, blocks, epochs = 7, 3, 2
    assert calls.count(True) == passes * batches * blocks * epochs
    assert calls.count(False) == batches * blocks * epochs


# ---- the selection


def list_names(choices: Choices, model: nn.Module) -> list[str]:
    chosen = select_submodules(model, choices, "MyTrainer")
    return [name for name, module in model.named_modules() if module in chosen]


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        ([], []),
        ([Block], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks*"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["*"], ["first", "last", "blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.[02]", "last"], ["last", "blocks.0", "blocks.2"]),
        (["blocks.0.inner", "blocks.0.inner.*"], ["blocks.0.inner"]),
        (["blocks.0.inner.*", Block, nn.Linear], ["first", "last", "blocks.0", "blocks.1", "blocks.2"]),
        ([nn.BatchNorm1d], ["blocks.0.inner.1", "blocks.1.inner.1", "blocks.2.inner.1"]),
    ],
)
def test_the_outermost_matching_submodules_are_selected(choices: Choices, names: list[str]) -> None:
    assert list_names(choices, Network()) == names


def test_a_module_with_two_names_is_selected_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert select_submodules(model, ["0", "2"], "MyTrainer") == [shared]
    assert select_submodules(model, ["2"], "MyTrainer") == [shared]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "block.*",
            r"has the name 'block\.\*'\. Did you mean `blocks\.\d`\? There are: first, last, .* and \d+ more\.",
        ),
        ("blocks", r"has the name 'blocks'. Did you mean"),
        (nn.Conv2d, r"Network calls no submodule that is a Conv2d. There are: BatchNorm1d, Block, Dropout, Linear"),
        (nn.ModuleList, r"is a ModuleList"),
        (Network, r"is a Network"),
    ],
)
def test_a_selector_without_matches_is_refused_before_the_first_step(choice: Any, message: str) -> None:
    trainer = Checkpointed(**make_parts(), gradient_checkpointing=["first", choice])
    with pytest.raises(ModelError, match=message):
        trainer.train(tiny_data(), num_epochs=1)
    assert trainer.progress.steps == 0
    assert not any("forward" in vars(module) for module in trainer.model.modules())


@pytest.mark.parametrize("choices", ["blocks.*", Block, 1, [Block()], [1], [int]])
def test_an_invalid_list_of_classes_and_names_is_refused(choices: Any) -> None:
    with pytest.raises(OptionError, match="gradient_checkpointing"):
        Checkpointed(**make_parts(), gradient_checkpointing=choices)


# ---- after the run


class Failing(Checkpointed):
    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        block = self.unwrapped_model.get_submodule("blocks.1")
        assert "forward" in vars(block)
        copies.extend([copy.deepcopy(block), pickle.loads(pickle.dumps(block))])
        raise KeyError


copies: list[nn.Module] = []


def test_an_exception_restores_the_model() -> None:
    trainer = Failing(**make_parts(), gradient_checkpointing=[Block])
    with pytest.raises(KeyError):
        trainer.train(tiny_data(), num_epochs=1)
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_a_copy_made_during_a_run_has_its_own_weights() -> None:
    copies.clear()
    with pytest.raises(KeyError):
        Failing(**make_parts(), gradient_checkpointing=[Block]).train(tiny_data(), num_epochs=1)
    for made in copies:
        made.eval()
        inputs = torch.ones(2, 8, dtype=torch.float64)
        before = made(inputs)
        with torch.no_grad():
            made.get_parameter("inner.4.bias").add_(1)
        torch.testing.assert_close(made(inputs), before + 1)


def test_backward_can_run_twice_through_a_graph() -> None:
    class Twice(Checkpointed):
        @override
        def backward(self, loss: Tensor) -> None:
            torch.autograd.grad(loss, self.optimizer.param_groups[0]["params"], retain_graph=True)
            super().backward(loss)

    assert_same(train([Block], Twice), train(()))


def train_gpt2(names: Sequence[str], *, use_cache: bool, fails: bool = False) -> tuple[Tensor, Any]:
    transformers = pytest.importorskip("transformers")

    class LanguageModel(GradCheckpointMixin, TrainingLoop[Tensor, Tensor]):
        @override
        def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
            outputs = self.model(input_ids=batch, labels=batch)
            assert not fails
            return StepOutput(loss=outputs.loss, outputs=outputs.logits)

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, use_cache=use_cache, attn_implementation="eager", n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = LanguageModel(model, optimizer=optimizer, default_callbacks=(), gradient_checkpointing=names)
    with suppress(AssertionError):
        trainer.train([torch.arange(8)] * 16, num_epochs=1)
    return nn.utils.parameters_to_vector(model.parameters()), config


def test_a_model_with_a_cache_trains_without_it_and_has_it_again_after_the_run() -> None:
    expected, _ = train_gpt2([], use_cache=False)
    weights, config = train_gpt2(["transformer.h.*"], use_cache=True)
    assert torch.equal(weights, expected)
    assert config.use_cache
    assert train_gpt2(["transformer.h.*"], use_cache=True, fails=True)[1].use_cache
    assert not train_gpt2(["transformer.h.*"], use_cache=False)[1].use_cache


class Compiled(CompileMixin, GradCheckpointMixin, Trainer): ...


@pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace the builtin")
def test_a_compiled_model_can_recompute_modules_without_batch_norm() -> None:
    losses = []
    for kind in (Trainer, Compiled):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2))
        options: dict[str, Any] = (
            {} if kind is Trainer else {"gradient_checkpointing": ["0"], "compile_backend": "eager"}
        )
        options |= {"loss_func": nn.MSELoss(), "optimizer": torch.optim.SGD(net.parameters(), 0.1)}
        history = kind(net, **options, default_callbacks=()).train(
            TensorDataset(torch.ones(16, 4), torch.ones(16, 2)), num_epochs=2
        )
        losses.append([step.loss for step in history.steps])
    assert losses[0] == losses[1]
