"""Random compositions of a trainer, its parts, its data and its options, each drawn from a seed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tests.fuzz.data import DATASETS, ITERABLE, OWN_BATCHES, READY
from tests.fuzz.parts import DRAWS, MODELS, OPTIMIZERS, SCHEDULES, WATCHES_LOSS

MIXINS = ("ema", "swa", "clip_norm", "clip_value", "bf16", "metrics", "early_stopping", "best", "logged", "state")


@dataclass(frozen=True)
class Case:
    """A composition. The defaults are the simplest values, to which a failing case is reduced.

    Args:
        model: Key of `MODELS`.
        optimizer: Key of `OPTIMIZERS`.
        schedule: Key of `SCHEDULES`.
        mixins: Mixins and callbacks, of `MIXINS`.
        data: Key of `DATASETS`.
        samples: Number of training samples.
        batch: Samples of a batch on each rank.
        accumulation: Batches of a step on each rank.
        epochs: Number of epochs.
        max_steps: Limit on steps, None for no limit.
        evaluate_every: Steps between evaluations; 0 for each epoch.
        eval_sets: Number of evaluation sets.
        save_every: Steps between checkpoints; 0 for each epoch.
        kills: Moments at which the run is killed, as parts of the events of an uninterrupted run.
        killed_rank: The rank that is killed.
        updates: `"together"` for two optimizers that step together, `"alternating"` for two updates in each step.
        freeze_at: The epoch in which a callback freezes a parameter by hand, counted from 1; 0 for none.
        accumulation_schedule: `"epochs"` or `"steps"` if the number of batches of a step changes, by which of them.
        max_items: Limit on items, None for no limit.
    """

    model: str = "linear"
    optimizer: str = "sgd"
    schedule: str = "none"
    mixins: tuple[str, ...] = ()
    data: str = "tensors"
    samples: int = 8
    batch: int = 2
    shuffle: bool = False
    drop_last: bool = False
    workers: int = 0
    accumulation: int = 1
    epochs: int = 1
    max_steps: int | None = None
    evaluate_every: int = 0
    eval_sets: int = 0
    save_every: int = 1
    in_background: bool = False
    world_size: int = 1
    kills: tuple[float, ...] = (0.5,)
    killed_rank: int = 0
    updates: str = "one"
    freeze_at: int = 0
    accumulation_schedule: str = "none"
    max_items: int | None = None

    @property
    def is_valid(self) -> bool:
        """Whether the parts go together."""
        per_step, readers = self.batch * self.world_size, max(self.workers, 1) if self.data in ITERABLE else 1
        needs_evaluation = "best" in self.mixins or "early_stopping" in self.mixins or self.schedule in WATCHES_LOSS
        return (
            not (needs_evaluation and not self.eval_sets)
            and not (self.drop_last and (self.samples // readers < per_step or self.data in READY | OWN_BATCHES))
            and not (self.workers and self.data in OWN_BATCHES)
            and not (self.shuffle and self.data in ITERABLE | READY | OWN_BATCHES)
            and not (self.data in ITERABLE and self.max_steps is None)
            and self.killed_rank < self.world_size
            and not {"clip_norm", "clip_value"} <= set(self.mixins)
            and not ("skip_spikes" in self.mixins and self.updates == "alternating")
            and not ("swa" in self.mixins and {"ema", "best"} & set(self.mixins))
        )

    @property
    def has_plain_loop(self) -> bool:
        """Whether `plain_losses` can compute the losses.

        It cannot for batch statistics and random draws of several ranks, nor for a model that draws from the generators
        from which rare draws of the data come until they are noticed.
        """
        shares_draws = self.model in DRAWS and (self.world_size > 1 or self.data == "rare")
        return not shares_draws and self.schedule not in WATCHES_LOSS


def draw(seed: int) -> Case:
    """Draw a valid case. What was added last has a generator of its own, so that the rest of a seed stays as it was."""
    chance, added = random.Random(seed), random.Random(f"updates {seed}")
    while not (case := draw_any(chance)).is_valid:
        pass
    while not (extended := draw_updates(case, added)).is_valid:
        pass
    return draw_lengths(extended, random.Random(f"lengths {seed}"))


def draw_updates(case: Case, chance: random.Random) -> Case:
    updates = chance.choice(["one", "one", "together", "alternating"])
    return replace(case, updates=updates, freeze_at=chance.choice([0, 0, 1, 2]))


def draw_lengths(case: Case, chance: random.Random) -> Case:
    schedule = chance.choice(["none", "none", "epochs", "steps"])
    guard = ("skip_spikes",) if chance.random() < 0.25 and case.updates != "alternating" else ()
    limit = chance.choice([None, None, chance.randint(1, 30)])
    return replace(case, mixins=case.mixins + guard, accumulation_schedule=schedule, max_items=limit)


def draw_any(chance: random.Random) -> Case:
    def pick(values: Sequence[Any], simple: float = 0.0) -> Any:
        """Return a random value, the first one with at least a probability."""
        return values[0] if chance.random() < simple else chance.choice(values)

    world_size = 2 if chance.random() < 0.08 else 1
    data = pick(list(DATASETS), 0.1)
    return Case(
        model=pick(list(MODELS)),
        optimizer=pick(list(OPTIMIZERS)),
        schedule=pick(list(SCHEDULES), 0.2),
        mixins=tuple(name for name in MIXINS if chance.random() < 0.25),
        data=data,
        samples=chance.randint(5, 14),
        batch=chance.randint(1, 5),
        shuffle=chance.random() < 0.5,
        drop_last=chance.random() < 0.2,
        workers=pick([0, 1, 2], 0.75),
        accumulation=pick([1, 2, 3], 0.4),
        epochs=chance.randint(1, 3),
        max_steps=chance.randint(2, 12) if data in ITERABLE or chance.random() < 0.2 else None,
        evaluate_every=pick([0, 1, 2, 3], 0.5),
        eval_sets=pick([0, 1, 2]),
        save_every=pick([1, 0, 2, 3]),
        in_background=chance.random() < 0.2,
        world_size=world_size,
        kills=tuple(chance.random() for _ in range(chance.randint(1, 2))),
        killed_rank=chance.randrange(world_size),
    )


def simpler(case: Case) -> Iterator[Case]:
    """Iterate over valid cases that are simpler by one value."""
    for name in case.mixins:
        yield from valid(replace(case, mixins=tuple(other for other in case.mixins if other != name)))
    for field in fields(Case):
        if field.name not in ("mixins", "kills") and getattr(case, field.name) != field.default:
            simple: dict[str, Any] = {field.name: field.default}
            yield from valid(replace(case, **simple))
    for kill in case.kills if len(case.kills) > 1 else ():
        yield from valid(replace(case, kills=(kill,)))
    if case.epochs > 2:
        yield from valid(replace(case, epochs=2))


def valid(case: Case) -> Iterator[Case]:
    if case.is_valid:
        yield case
