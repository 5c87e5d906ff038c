"""`explain()`: its advice is correct, and it changes nothing."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader
from typing_extensions import override

from ptacc import (
    DeepSpeedMixin,
    EMAMixin,
    Epochs,
    FreezeMixin,
    FSDPMixin,
    GradAccumMixin,
    RestoreBestWeights,
    TensorParallelMixin,
    Trainer,
)
from ptacc.errors import OptionError
from ptacc.loop.advice import advise_on_matmul, advise_on_optimizer, has_sparse_gradients
from ptacc.loop.explain import HEADINGS, VALUE_WIDTH, shorten
from ptacc.testing import tiny_data, tiny_parts
from tests.display.test_tables import read_texts
from tests.ranks import run_ranks


def make(make_optimizer: Callable[..., Optimizer], model: nn.Module | None = None, **options: object) -> Trainer:
    parts: dict[str, Any] = tiny_parts()
    parts["model"] = model or parts["model"]
    parts["optimizer"] = make_optimizer(parts["model"].parameters(), lr=0.01, **options)
    return Trainer(**parts)


def advised_code(trainer: Trainer) -> list[str]:
    explanation = trainer.explain()
    return [code for code, _ in explanation["advice"]] if "advice" in explanation else []


# ---- the optimizer

ADVISED: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (Adam, {}),
    (Adam, {"amsgrad": True, "maximize": True}),
    (AdamW, {"weight_decay": 0.1}),
    (Adagrad, {}),
]


@pytest.mark.parametrize(("kind", "options"), ADVISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_advised_fused_kernel_works_and_gives_the_same_weights(
    kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    weights = []
    for fused in ({}, {"fused": True}):
        torch.manual_seed(0)
        trainer = make(kind, nn.Linear(4, 2, dtype=dtype), **options, **fused)
        assert advised_code(trainer) == ([] if fused else [f"{kind.__name__}(..., fused=True)"])
        for _ in range(3):
            for parameter in trainer.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            trainer.optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.prove
@pytest.mark.parametrize(("kind", "options"), ADVISED)
@pytest.mark.parametrize("width", [8, 1024])
def test_an_advised_fused_kernel_is_faster(kind: Any, options: dict[str, Any], width: int) -> None:
    best = {}
    for fused in (None, True):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        optimizer = kind(model.parameters(), lr=0.01, fused=fused, **options)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        best[fused] = min(measure_steps(optimizer) for _ in range(10))
    assert best[True] < best[None]


def measure_steps(optimizer: Optimizer) -> float:
    started = time.process_time()
    for _ in range(10):
        optimizer.step()
    return time.process_time() - started


class AdamSubclass(Adam): ...


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {}),
        (Adam, {"fused": True}),
        (Adam, {"fused": False}),
        (Adam, {"foreach": True}),
        (Adam, {"differentiable": True}),
        (RMSprop, {}),
        (AdamSubclass, {}),
    ],
)
def test_nothing_is_advised_without_a_gain_or_against_the_users_choice(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    trainer = make(kind, **options)
    explanation = trainer.explain()
    assert "advice" not in explanation
    assert "advice" not in str(explanation)


def test_a_fused_kernel_for_sparse_gradients_is_not_advised() -> None:
    sparse = nn.Sequential(nn.EmbeddingBag(4, 2, sparse=True))
    assert has_sparse_gradients(sparse)
    assert advised_code(make(Adagrad, sparse)) == []
    sparse(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Adagrad(sparse.parameters(), fused=True).step()


def test_a_fused_kernel_for_complex_parameters_is_not_advised() -> None:
    model = nn.Linear(4, 2, dtype=torch.complex64)
    assert advised_code(make(Adam, model)) == []
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="fused"):
        Adam(model.parameters(), fused=True).step()


def test_a_fused_kernel_that_breaks_after_a_skipped_step_is_not_advised() -> None:
    model = nn.Linear(4, 2)
    with_momentum, adam = SGD(model.parameters(), momentum=0.9), Adam(model.parameters())
    cpu = torch.device("cpu")
    assert len(list(advise_on_optimizer(with_momentum, cpu, "bf16"))) == 1
    assert list(advise_on_optimizer(with_momentum, cpu, "fp16")) == []
    assert len(list(advise_on_optimizer(adam, cpu, "fp16"))) == 1


def test_advice_changes_nothing() -> None:
    trainer = make(Adam)
    before = str(trainer.optimizer.state_dict())
    assert "Adam(..., fused=True)  one kernel" in str(trainer.explain())
    assert str(trainer.optimizer.state_dict()) == before


# ---- matrices


@pytest.fixture
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "precision", "capability", "count"),
    [
        (torch.float32, "no", (8, 0), 1),
        (torch.float32, "no", (9, 0), 1),
        (torch.float32, "no", (7, 5), 0),
        (torch.float32, "no", None, 0),
        (torch.float32, "bf16", (9, 0), 0),
        (torch.bfloat16, "no", (9, 0), 0),
    ],
)
def test_tf32_is_advised_for_float32_on_gpus_that_have_it(
    dtype: torch.dtype, precision: str, capability: tuple[int, int] | None, count: int
) -> None:
    assert len(list(advise_on_matmul({dtype}, precision, capability))) == count


def test_tf32_is_not_advised_if_it_is_on(matmul_precision: None) -> None:
    ((code, _),) = advise_on_matmul({torch.float32}, "no", (9, 0))
    exec(code)
    assert list(advise_on_matmul({torch.float32}, "no", (9, 0))) == []


@pytest.mark.parametrize(("precision", "count"), [("tf32", 0), ("ieee", 1)])
def test_torchs_newer_setting_of_tf32_is_recognised(precision: str, count: int) -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = precision
        assert len(list(advise_on_matmul({torch.float32}, "no", (9, 0)))) == count
    finally:
        settings.fp32_precision = before


# ---- the other sections


class Accumulating(GradAccumMixin, Trainer): ...


def batches_on_rank() -> tuple[tuple[str, ...], ...]:
    trainer = Accumulating(**tiny_parts(), gradient_accumulation_steps=3)
    return trainer.explain(tiny_data(), num_epochs=2, per_device_batch_size=2)["batches"]


def test_the_batch_arithmetic_covers_all_ranks() -> None:
    first, second = run_ranks(batches_on_rank, 2)
    assert first == second
    assert first == (
        ("samples per step", "12 = 2 (batch size) x 2 (processes) x 3 (batches per step)"),
        ("steps per epoch", "2 = 24 samples / 12, rounded up"),
        ("total steps", "4 in 2 epochs"),
    )


def test_the_batches_of_a_loader_are_its_own() -> None:
    trainer, data = make(SGD), tiny_data()
    loader: DataLoader[Any] = DataLoader(data, batch_size=5)
    assert trainer.explain(loader)["batches"] == trainer.explain(data, per_device_batch_size=5)["batches"]
    with pytest.raises(OptionError, match="a loader without a batch size"):
        trainer.explain(DataLoader(data, batch_sampler=[[0, 1]]))


class Own(EMAMixin, Accumulating):
    """Averages, too.

    And more.
    """

    ema_decay: float = 0.5

    @override
    def on_run_end(self) -> None:
        super().on_run_end()


def test_classes_overrides_and_states_are_listed() -> None:
    explanation = Own(**tiny_parts(), callbacks=[RestoreBestWeights("eval_loss")]).explain()
    assert explanation["classes"][0] == ("Own", "Averages, too.")
    assert explanation["classes"][2] == ("Accumulating", "")
    assert ("on_run_end", "event", "Own > EMAMixin > [RestoreBestWeights]") in explanation["hooks"]
    assert ("count_items", "default", "Trainer > BatchHooks") in explanation["hooks"]
    assert explanation["state"][-1] == ("RestoreBestWeights", "callback")


def test_values_of_options_are_short() -> None:
    assert shorten("a" * (VALUE_WIDTH - 2)) == repr("a" * (VALUE_WIDTH - 2))
    assert shorten({"a": 1, "b": 2}) == "a, b"
    assert shorten("a" * VALUE_WIDTH) == f"'{'a' * (VALUE_WIDTH - 4)}..."


def test_an_unknown_section_raises_key_error() -> None:
    with pytest.raises(KeyError, match="weather"):
        make(SGD).explain()["weather"]


# ---- layers and memory


def test_modules_that_are_trained_with_the_model_are_in_the_tables_of_layers_and_memory() -> None:
    model, loss = nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 1, bias=False))
    optimizer = Adam([*model.parameters(), *loss.parameters()])
    explanation = Trainer(model, loss_func=loss, optimizer=optimizer).explain()
    assert [row[0] for row in explanation["layers"]] == ["(model)", "options.loss_func", "options.loss_func.0"]
    assert ("weights", "48 B", "12 parameters in float32") in explanation["memory"]
    assert ("optimizer", "96 B", "state of Adam after the first step") in explanation["memory"]


class Sharded(FSDPMixin, Trainer): ...


class Split(TensorParallelMixin, Trainer): ...


class Partitioned(DeepSpeedMixin, Trainer): ...  # by default in ZeRO's stage 2


def sizes_on_rank(kind: Callable[..., Trainer]) -> dict[str, str]:
    return {what: size for what, size, _ in kind(**tiny_parts()).explain()["memory"]}


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "optimizer"),
    [(Trainer, 80, 80, 80), (Sharded, 40, 40, 40), (Partitioned, 80, 40, 40)],
)
def test_the_memory_of_sharded_tensors_is_that_of_a_rank(
    kind: type[Trainer], weights: int, gradients: int, optimizer: int
) -> None:
    sizes = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    sizes["total"] = sum(sizes.values())
    assert run_ranks(sizes_on_rank, 2, kind) == [{what: f"{size} B" for what, size in sizes.items()}] * 2


def total_of_split_model() -> str:
    return Split(**tiny_parts(), tensor_parallel_size=2).explain()["memory"][-1][2]


def test_the_memory_of_a_model_that_tensor_parallelism_splits_is_a_bound() -> None:
    text = "less where tensor parallelism splits layers over 2 ranks, without activations"
    assert all(total.startswith(text) for total in run_ranks(total_of_split_model, 2))


class Freezing(FreezeMixin, Trainer): ...


def test_what_a_run_will_freeze_is_not_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    trainer = Freezing(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=Adam(model.parameters()),
        frozen=["0", "1"],
        unfreeze_at={"0": Epochs(1)},
    )
    explanation = trainer.explain()
    assert [row[-1] for row in explanation["layers"]] == ["6", "no", "no", "yes"]
    assert ("gradients", "24 B", "6 values in float32") in explanation["memory"]
    assert ("eval", "1", "as it is now, with its submodules") in explanation["modes"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


# ---- in notebooks


def test_a_trainer_shows_its_options_and_creates_no_accelerator() -> None:
    trainer = make(SGD)
    texts = read_texts(trainer._repr_html_())
    assert texts[:7] == ["Trainer: options", "option", "value", "source", "model", "Linear(...)", "argument"]
    assert trainer._state.runtime is None  # noqa: SLF001 - reading it creates one


def test_an_explanation_has_the_same_tables_in_html_as_in_text() -> None:
    explanation = make(Adam).explain()
    texts = read_texts(explanation._repr_html_())
    assert [title for title in HEADINGS.values() if title in texts] == [HEADINGS[key] for key in explanation]
    assert {cell for rows in explanation.values() for row in rows for cell in row if cell} <= set(texts)
    assert repr(explanation) == str(explanation)
