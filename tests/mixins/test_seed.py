import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc import SeedMixin, Trainer
from ptacc.testing import tiny_data


class Seeded(SeedMixin, Trainer): ...


def train(seed: int | None, *, runs: int = 1) -> tuple[Tensor, int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 2).double(), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Seeded(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, seed=seed, default_callbacks=())
    for _ in range(runs):
        trainer.train(tiny_data(), num_epochs=2)
    return next(model.parameters()).detach(), trainer.run.seed


def test_a_seed_makes_a_run_reproducible() -> None:
    assert torch.equal(train(3)[0], train(3)[0])
    assert not torch.equal(train(3)[0], train(4)[0])


def test_without_a_seed_one_is_drawn_and_recorded() -> None:
    _, seed = train(None)
    assert seed != train(None)[1]


def test_a_run_on_the_cpu_uses_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    train(3)  # the CPU is selected

    def refuse() -> None:
        raise AssertionError("CUDA was initialized")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.random, "_lazy_init", refuse)
    train(3)


def test_a_seeded_run_restores_the_global_generators() -> None:
    model = nn.Sequential(nn.Linear(4, 2).double(), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Seeded(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, seed=3, default_callbacks=())
    state = torch.get_rng_state()
    trainer.train(tiny_data(), num_epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"deterministic": True}, {}])
def test_determinism_lasts_as_long_as_the_run(options: dict[str, bool]) -> None:
    recorded: list[bool] = []

    class Looking(Seeded):
        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            recorded.append(torch.are_deterministic_algorithms_enabled())
            return super().compute_train_loss(outputs, targets)

    model = nn.Linear(4, 2).double()
    parts = {"loss_func": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    Looking(model, **parts, **options, default_callbacks=()).train(tiny_data(), max_steps=1)  # type: ignore[arg-type]
    assert recorded == [bool(options)]
    assert not torch.are_deterministic_algorithms_enabled()
