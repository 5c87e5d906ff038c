"""Muon with AdamW, and an actor with a critic: as plain loops, however a step is split, and resumed from any step."""

from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Muon
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import (
    CheckpointMixin,
    GradAccumMixin,
    GradClipMixin,
    MultiUpdateLoop,
    OptimizerDict,
    Pair,
    SeedMixin,
    StepOutput,
    Steps,
    Trainer,
    Update,
)
from tests.ranks import run_ranks

GLOBAL_BATCH, SAMPLES, STEPS, MAX_NORM = 12, 48, 6, 0.5
SPLITS = [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 4)]
"""Numbers of processes and of batches that a step consists of."""
Recorded = list[tuple[Tensor, Tensor]]


# ---- Muon for matrices and AdamW for the rest, which step together


class Together(SeedMixin, GradAccumMixin, GradClipMixin, Trainer):
    batches: Recorded = field(default_factory=list)

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        self.batches.append(batch)
        return super().train_step(batch)


def make_matrices() -> tuple[nn.Module, OptimizerDict]:
    """Make a model in float64. Muon orthogonalizes in bfloat16, which rounds differences between splits away."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return model, OptimizerDict({"muon": Muon(matrices, lr=0.05), "adamw": AdamW(others, lr=0.01)})


def train_together(model: nn.Module, optimizers: OptimizerDict, batches: Recorded) -> None:
    for inputs, targets in batches:
        functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizers["muon"].step()
        optimizers["adamw"].step()
        model.zero_grad()


# ---- an actor and a critic, which are updated one after the other


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def act(model: ActorCritic, states: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of actions that depend on the weights, and their rewards."""
    logits = model.actor(states)
    actions = (logits.detach() + states[:, :3]).argmax(1)
    chosen = functional.log_softmax(logits, 1).gather(1, actions[:, None])[:, 0]
    return chosen, (actions == best).to(states.dtype)


class Alternating(SeedMixin, GradAccumMixin, GradClipMixin, MultiUpdateLoop[Pair, Tensor, ActorCritic]):
    batches: Recorded = field(default_factory=list)

    @override
    def train_updates(self, batch: Pair) -> Iterator[Update[Tensor]]:
        self.batches.append(batch)
        chosen, rewards = act(self.model, *batch)
        yield Update("critic", loss=functional.mse_loss(self.model.critic(batch[0])[:, 0], rewards))
        advantages = rewards - self.model.critic(batch[0])[:, 0].detach()
        yield Update("actor", loss=-(chosen * advantages).mean(), outputs=advantages)

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        _, rewards = act(self.model, *batch)
        return StepOutput(loss=-rewards.mean(), outputs=rewards)


def make_actor_critic() -> tuple[nn.Module, OptimizerDict]:
    torch.manual_seed(0)
    model = ActorCritic().double()
    actor, critic = Adam(model.actor.parameters(), lr=0.02), SGD(model.critic.parameters(), lr=0.1, momentum=0.9)
    return model, OptimizerDict({"actor": actor, "critic": critic})


def train_alternating(model: Any, optimizers: OptimizerDict, batches: Recorded) -> None:
    for states, best in batches:
        chosen, rewards = act(model, states, best)
        functional.mse_loss(model.critic(states)[:, 0], rewards).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.critic.parameters(), MAX_NORM)
        optimizers["critic"].step()
        advantages = rewards - model.critic(states)[:, 0].detach()
        (-(chosen * advantages).mean()).backward()
        nn.utils.clip_grad_norm_(model.actor.parameters(), MAX_NORM)
        optimizers["actor"].step()
        model.zero_grad()


# ---- both


MakeParts = Callable[[], tuple[nn.Module, OptimizerDict]]
LOOPS: dict[str, tuple[type[Any], MakeParts, Callable[[Any, OptimizerDict, Recorded], None]]] = {
    "muon and adamw": (Together, make_matrices, train_together),
    "actor and critic": (Alternating, make_actor_critic, train_alternating),
}
every_loop = pytest.mark.parametrize("name", LOOPS)


def train(
    name: str, batch_size: int = GLOBAL_BATCH, steps: int = STEPS, *, mixins: tuple[type, ...] = (), **options: Any
) -> tuple[dict[str, Tensor], Recorded]:
    """Train, and return the weights with the losses, and the batches."""
    kind, make_parts, _ = LOOPS[name]
    model, optimizers = make_parts()
    data: Any = TensorDataset(torch.randn(SAMPLES, 4).double(), torch.randint(3, (SAMPLES,)))
    given: dict[str, Any] = {"seed": 0, "max_grad_norm": MAX_NORM, "default_callbacks": (), **options}
    if kind is Together:
        given["loss_func"] = nn.CrossEntropyLoss()
    trainer: Any = type("Composed", (*mixins, kind), {})(model, optimizer=optimizers, **given)
    trainer.train(data, max_steps=steps, per_device_batch_size=batch_size)
    losses = torch.tensor([step.loss for step in trainer.history.steps], dtype=torch.float64)
    return {**model.state_dict(), "losses": losses}, trainer.batches


@every_loop
def test_weights_are_those_of_a_plain_loop_to_the_last_bit(name: str) -> None:
    _, make_parts, plain_loop = LOOPS[name]
    state, batches = train(name)
    model, optimizers = make_parts()
    plain_loop(model, optimizers, batches)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@every_loop
@pytest.mark.parametrize(("ranks", "accumulated"), SPLITS)
def test_the_split_of_a_step_makes_no_difference(name: str, ranks: int, accumulated: int) -> None:
    expected, _ = train(name)

    def split() -> dict[str, Tensor]:
        return train(name, GLOBAL_BATCH // (ranks * accumulated), gradient_accumulation_steps=accumulated)[0]

    for state in run_ranks(split, ranks) if ranks > 1 else [split()]:
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@every_loop
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_resumes_from_every_step(name: str, step: int, tmp_path: Path) -> None:
    expected, _ = train(name)
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Steps(1), "mixins": (CheckpointMixin,)}
    train(name, steps=step, **options)
    resumed, _ = train(name, resume=True, **options)
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
