"""Balance poles on carts with an actor and a critic. The data is a stream of what the current actor does."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from ptacc import MultiUpdateLoop, OptimizerDict, SeedMixin, Update

CARTS = 32
STEPS = 32
DISCOUNT = 0.99


class ActorCritic(nn.Module):
    """Both parts take states `(..., 4)`: position, speed, angle and angular speed."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))  # logits of left and right
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(-2))


@dataclass(frozen=True)
class Rollout:
    """What happened to each cart, step by step.

    Args:
        states: `(STEPS, CARTS, 4)`.
        actions: `(STEPS, CARTS)`: 0 is left, 1 is right.
        returns: `(STEPS, CARTS)`: the discounted share of the time to come until the pole falls, from 0 to 1.
    """

    states: Tensor
    actions: Tensor
    returns: Tensor


def start(model: ActorCritic, carts: int) -> Tensor:
    """Return states close to upright, on the device of the model."""
    return 0.1 * torch.rand(carts, 4, device=next(model.parameters()).device) - 0.05


def push(states: Tensor, actions: Tensor) -> Tensor:
    """Return the states `(carts, 4)` after a push of 20 ms. Source: Barto, Sutton and Anderson, 1983."""
    _, speed, angle, spin = states.unbind(dim=1)
    force = (20 * actions - 10 + 0.05 * spin.square() * angle.sin()) / 1.1
    torque = (9.8 * angle.sin() - force * angle.cos()) / (2 / 3 - angle.cos().square() / 22)
    acceleration = force - torque * angle.cos() / 22
    return states + 0.02 * torch.stack([speed, acceleration, spin, torque], dim=1)


def has_fallen(states: Tensor) -> Tensor:
    return (states[:, 0].abs() > 2.4) | (states[:, 2].abs() > 0.21)


@torch.no_grad()
def roll_out(model: ActorCritic, states: Tensor) -> tuple[Rollout, Tensor]:
    """Act from some states. Return what happened, and the last states. A cart whose pole falls starts again."""
    visited, actions, falls, returns = [], [], [], []
    for _ in range(STEPS):
        visited.append(states)
        actions.append(model.actor(states).softmax(dim=1).multinomial(1).squeeze(1))
        states = push(states, actions[-1])
        falls.append(has_fallen(states))
        states = torch.where(falls[-1][:, None], start(model, CARTS), states)
    value = model.critic(states)
    for is_fallen in reversed(falls):
        value = torch.where(is_fallen, 0.0, 1 - DISCOUNT + DISCOUNT * value)
        returns.append(value)
    return Rollout(torch.stack(visited), torch.stack(actions), torch.stack(returns[::-1])), states


class Rollouts(IterableDataset[Rollout]):
    def __init__(self, model: ActorCritic) -> None:
        self.model = model

    @override
    def __iter__(self) -> Iterator[Rollout]:
        states = start(self.model, CARTS)
        while True:
            rollout, states = roll_out(self.model, states)
            yield rollout


class ActorCriticTrainer(SeedMixin, MultiUpdateLoop[Rollout, None, ActorCritic]):
    @override
    def train_updates(self, batch: Rollout) -> Iterator[Update[None]]:
        advantages = batch.returns - self.model.critic(batch.states)
        yield Update("critic", loss=advantages.square().mean())
        log_probabilities = self.model.actor(batch.states).log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
        taken = log_probabilities.gather(-1, batch.actions[..., None]).squeeze(-1)
        weights = advantages.detach() / advantages.detach().std()
        loss = -(weights * taken).mean() - 0.01 * entropy
        yield Update("actor", loss=loss, logged={"entropy": entropy.detach()})


@torch.no_grad()
def play(model: ActorCritic, carts: int = 100, limit: int = 500) -> float:
    """Return for how many steps a pole stands in the mean, if the actor always does what it prefers."""
    states, total = start(model, carts), 0
    stands = torch.ones(carts, dtype=torch.bool, device=states.device)
    for _ in range(limit):
        states = push(states, model.actor(states).argmax(dim=1))
        stands &= ~has_fallen(states)
        total += int(stands.sum())
    return total / carts


def main() -> None:
    torch.manual_seed(0)
    model = ActorCritic()
    optimizers = {"actor": Adam(model.actor.parameters(), lr=3e-3), "critic": Adam(model.critic.parameters(), lr=1e-2)}
    trainer = ActorCriticTrainer(model, optimizer=OptimizerDict(optimizers), seed=0)
    trainer.print(f"mean return before: {play(model):.0f}")
    trainer.train(DataLoader(Rollouts(model), batch_size=None), max_steps=1000)
    trainer.print(f"mean return: {play(model):.0f}")


if __name__ == "__main__":
    main()
