"""Several updates per step: as in a plain loop, whatever the split of a step into batches and processes."""

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric
from typing_extensions import override

from ptacc import (
    AMPMixin,
    Callback,
    CheckpointMixin,
    DDPMixin,
    EMAMixin,
    FSDPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    MetricsMixin,
    MultiUpdateLoop,
    OptimizerDict,
    SeedMixin,
    StepOutput,
    Steps,
    SyncBatchNormMixin,
    Update,
)
from ptacc.engines.base import Engine
from ptacc.engines.default import TorchEngine
from ptacc.errors import CompositionError, LossError, OptionError
from ptacc.tuning import find_learning_rate
from tests.ranks import run_ranks

Images = tuple[Tensor, Tensor]
"""Real samples, and the noise from which false ones are made."""
SAMPLES = 24


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))


class Loop(SeedMixin, GradAccumMixin, GradClipMixin, MultiUpdateLoop[Images, Tensor, GAN]):
    @override
    def eval_step(self, batch: Images) -> StepOutput[Tensor]:
        outputs: Tensor = self.model.critic(batch[0])
        return StepOutput(loss=outputs.mean(), outputs=outputs)


def real_loss(logits: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def false_loss(logits: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))


class DCGAN(Loop):
    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        real, noise = batch
        false = self.model.generator(noise)
        critic = self.model.critic
        yield Update("critic", loss=real_loss(critic(real)) + false_loss(critic(false.detach())))
        yield Update("generator", loss=real_loss(critic(false)), outputs=false)


def train_dcgan(model: GAN, optimizers: OptimizerDict, batches: list[Images]) -> None:
    for real, noise in batches:
        false = model.generator(noise)
        loss = real_loss(model.critic(real)) + false_loss(model.critic(false.detach()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers["critic"].step()
        model.zero_grad()
        real_loss(model.critic(false)).backward()  # type: ignore[no-untyped-call]
        optimizers["generator"].step()
        model.zero_grad()


def penalty(model: GAN, real: Tensor, false: Tensor) -> Tensor:
    between = ((real + false) / 2).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
    norms: Tensor = gradients.norm(dim=1)
    return (norms - 1).square().mean()


class WGAN(Loop):
    """Trains the generator in every third step, with a penalty on gradients."""

    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        real, noise = batch
        false, critic = self.model.generator(noise), self.model.critic
        distance = critic(false.detach()).mean() - critic(real).mean()
        yield Update("critic", loss=distance + 10 * penalty(self.model, real, false))
        if self.progress.steps % 3 == 2:
            yield Update("generator", loss=-critic(false).mean())


def train_wgan(model: GAN, optimizers: OptimizerDict, batches: list[Images]) -> None:
    for step, (real, noise) in enumerate(batches):
        false = model.generator(noise)
        distance = model.critic(false.detach()).mean() - model.critic(real).mean()
        (distance + 10 * penalty(model, real, false)).backward()
        optimizers["critic"].step()
        model.zero_grad()
        if step % 3 == 2:
            (-model.critic(false).mean()).backward()
            optimizers["generator"].step()
            model.zero_grad()


PlainLoop = Callable[[GAN, OptimizerDict, list[Images]], None]
LOOPS: dict[str, tuple[type[Loop], PlainLoop]] = {"dcgan": (DCGAN, train_dcgan), "wgan": (WGAN, train_wgan)}
every_loop = pytest.mark.parametrize("name", LOOPS)


@every_loop
def test_a_loop_takes_no_more_lines_than_a_plain_one(name: str) -> None:
    kind, plain = LOOPS[name]
    lines = len(inspect.getsource(kind.train_updates).splitlines())
    assert lines <= len(inspect.getsource(plain).splitlines())


def make_parts() -> tuple[GAN, OptimizerDict, Any]:
    torch.manual_seed(0)
    model = GAN().double()
    critic = SGD(model.critic.parameters(), lr=0.01, momentum=0.5)
    optimizers = OptimizerDict({"generator": Adam(model.generator.parameters(), lr=0.01), "critic": critic})
    return model, optimizers, TensorDataset(torch.randn(SAMPLES, 4).double(), torch.randn(SAMPLES, 3).double())


def train(kind: type[Loop], batch_size: int, steps: int = 8, **options: Any) -> dict[str, Tensor]:
    model, optimizers, data = make_parts()
    given: dict[str, Any] = {"seed": 0, "default_callbacks": (), **options}
    trainer = kind(model, optimizer=optimizers, **given)
    trainer.train(data, max_steps=steps, per_device_batch_size=batch_size)
    return {**model.state_dict(), "losses": torch.tensor([s.loss for s in trainer.history.steps], dtype=torch.float64)}


def read_batches(name: str) -> list[Images]:
    """Return the batches of six that a trainer is given."""
    seen: list[Images] = []

    class Reading(LOOPS[name][0]):  # type: ignore[misc]
        @override
        def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
            seen.append(batch)
            yield from super().train_updates(batch)

    model, optimizers, data = make_parts()
    Reading(model, optimizer=optimizers, seed=0, default_callbacks=()).train(data, max_steps=8, per_device_batch_size=6)
    return seen


@every_loop
def test_weights_are_those_of_a_plain_loop_to_the_last_bit(name: str) -> None:
    model, optimizers, _ = make_parts()
    LOOPS[name][1](model, optimizers, read_batches(name))
    state = train(LOOPS[name][0], 6)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@every_loop
@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2)])
def test_the_split_of_a_step_makes_no_difference(name: str, ranks: int, accumulated: int) -> None:
    expected = train(LOOPS[name][0], 6)
    size = 6 // (ranks * accumulated)

    def split() -> dict[str, Tensor]:
        return train(LOOPS[name][0], size, gradient_accumulation_steps=accumulated)

    for state in run_ranks(split, ranks) if ranks > 1 else [split()]:
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@every_loop
@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_resumes_from_every_step(name: str, step: int, tmp_path: Path) -> None:
    class Saving(CheckpointMixin, LOOPS[name][0]): ...  # type: ignore[misc]

    expected = train(LOOPS[name][0], 6)
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Steps(1)}
    train(Saving, 6, step, **options)
    resumed = train(Saving, 6, resume=True, **options)
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())


def test_losses_and_norms_are_reported_by_optimizer() -> None:
    model, optimizers, data = make_parts()
    trainer = WGAN(model, optimizer=optimizers, max_grad_norm=1.0, seed=0, default_callbacks=())
    trainer.train(data, max_steps=3, per_device_batch_size=6)
    names = [set(step.logged) for step in trainer.history.steps]
    of_critic = {"critic/loss", "critic/grad_norm", "critic/learning_rate", "generator/learning_rate"}
    assert names == [of_critic, of_critic, of_critic | {"generator/loss", "generator/grad_norm"}]
    last = trainer.history.steps[-1]
    assert last.loss == pytest.approx(last.logged["critic/loss"] + last.logged["generator/loss"])


class Misspelt(Loop):
    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        yield Update("critics", loss=self.model.critic(batch[0]).mean())


class Nothing(Loop):
    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        yield from ()


class NoUpdate(Loop):
    @override
    def train_updates(self, batch: Images) -> Iterator[Any]:
        yield self.model.critic(batch[0]).mean()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Misspelt, r"yielded Update\('critics'\), and the optimizers are generator, critic\. Did you mean `critic`"),
        (Nothing, r"Nothing\.train_updates yielded no update in step 1"),
        (NoUpdate, r"NoUpdate\.train_updates yielded a Tensor: it must yield Update"),
    ],
)
def test_a_wrong_update_is_an_error_of_the_first_step(kind: type[Loop], message: str) -> None:
    model, optimizers, data = make_parts()
    with pytest.raises(LossError, match=message):
        kind(model, optimizer=optimizers, default_callbacks=()).train(data, max_steps=1, per_device_batch_size=6)


class CriticOnly(Loop):
    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        yield Update("critic", loss=self.model.critic(batch[0]).mean())


class WithoutEvalStep(MultiUpdateLoop[Tensor, None, GAN]):
    @override
    def train_updates(self, batch: Tensor) -> Iterator[Update[None]]:
        yield Update("critic", loss=self.model.critic(batch).mean())


def test_an_evaluation_without_an_eval_step_is_an_error_before_the_first_step() -> None:
    model = GAN()
    optimizers = {name: SGD(part.parameters(), lr=0.1) for name, part in model.named_children()}
    trainer = WithoutEvalStep(model, optimizer=OptimizerDict(optimizers), default_callbacks=())
    data = list(torch.randn(4, 4))
    with pytest.raises(CompositionError, match="has no eval_step"):
        trainer.train(data, data, num_epochs=1)
    assert trainer.progress.steps == 0
    with pytest.raises(CompositionError, match="has no eval_step"):
        trainer.evaluate(data)


def test_an_optimizer_without_an_update_is_named_in_a_warning() -> None:
    model, optimizers, data = make_parts()
    trainer = CriticOnly(model, optimizer=optimizers, default_callbacks=())
    with pytest.warns(UserWarning, match=r"train_updates yielded 100 updates in this run, and none of generator"):
        trainer.train(data, max_steps=100, per_device_batch_size=6)


class Precise(AMPMixin, EMAMixin, MetricsMixin[Images, Tensor], DCGAN):
    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        for update in super().train_updates(batch):
            self.dtypes = [self.model.generator(batch[1]).dtype, update.loss.dtype]
            yield update

    @override
    def update_metrics(self, batch: Images, output: StepOutput[Tensor], metrics: Iterable[Any]) -> None:
        for metric in metrics:
            metric.update(output.outputs.shape[0])


def test_updates_run_under_autocast_and_their_outputs_reach_metrics() -> None:
    torch.manual_seed(0)
    model = GAN()
    data: Any = TensorDataset(torch.randn(SAMPLES, 4), torch.randn(SAMPLES, 3))
    optimizers = OptimizerDict({name: Adam(child.parameters()) for name, child in model.named_children()})
    options: dict[str, Any] = {"mixed_precision": "bf16", "ema_decay": 0.5, "default_callbacks": ()}
    options["train_metrics"] = {"size": MeanMetric()}
    trainer = Precise(model, optimizer=optimizers, **options)
    history = trainer.train(data, num_epochs=1, per_device_batch_size=6)
    assert trainer.dtypes == [torch.bfloat16, torch.float32]
    assert history[-1].train_metrics["size"] == 6


class Wrapped(DDPMixin, DCGAN): ...


class Sharded(FSDPMixin, DCGAN): ...


@pytest.mark.parametrize("kind", [Wrapped, Sharded])
def test_an_engine_with_one_update_per_step_is_refused_by_name(kind: type[Loop]) -> None:
    def message() -> str:
        with pytest.raises(OptionError) as caught:
            train(kind, 3)
        return str(caught.value)

    assert all("has one update per step" in text for text in run_ranks(message, 2))


class EndsEarly(Loop):
    """Does not update the generator for some batches, or on some ranks."""

    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        yield Update("critic", loss=self.model.critic(batch[0]).mean())
        if batch[0][0, 0] > 0:
            yield Update("generator", loss=self.model.generator(batch[1]).mean())


@pytest.mark.parametrize(("ranks", "accumulated"), [(1, 6), (2, 1)])
def test_updates_that_differ_between_batches_or_processes_are_an_error(ranks: int, accumulated: int) -> None:
    def message() -> str:
        model, optimizers, data = make_parts()
        options: dict[str, Any] = {"seed": 0, "gradient_accumulation_steps": accumulated, "default_callbacks": ()}
        trainer = EndsEarly(model, optimizer=optimizers, **options)
        with pytest.raises(LossError, match="yield different updates") as caught:
            trainer.train(data, num_epochs=3, per_device_batch_size=1)
        return str(caught.value)

    for text in run_ranks(message, ranks) if ranks > 1 else [message()]:
        assert "generator" in text
        assert "none" in text


class SameLoss(Loop):
    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        for name in ("critic", "generator"):
            yield Update(name, loss=self.model.critic(self.model.generator(batch[1])).mean())


@pytest.mark.parametrize("clipping", [{"max_grad_norm": 1.0}, {"max_grad_value": 0.1}], ids=str)
def test_an_update_whose_parameters_are_all_frozen_changes_nothing(clipping: dict[str, Any]) -> None:
    model, optimizers, data = make_parts()
    before = copy.deepcopy(model.requires_grad_(False).state_dict())
    model.generator.requires_grad_(True)
    trainer = SameLoss(model, optimizer=optimizers, default_callbacks=(), **clipping)
    trainer.train(data, max_steps=2, per_device_batch_size=6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("generator")}


def test_a_parameter_in_two_optimizers_is_refused() -> None:
    model = GAN()
    with pytest.raises(OptionError, match=r"a parameter of shape .* is in 'one' and in 'two'"):
        OptimizerDict({"one": Adam(model.critic.parameters()), "two": Adam(model.parameters())})


class Scheduled(LRSchedulerMixin, DCGAN): ...


def test_each_optimizer_has_its_schedule(tmp_path: Path) -> None:
    class Saving(CheckpointMixin, Scheduled): ...

    options: dict[str, Any] = {
        "create_scheduler": lambda optimizer, _: StepLR(optimizer, 2, gamma=0.5),
        "create_scheduler_of": {"critic": lambda optimizer, _: StepLR(optimizer, 1, gamma=0.1)},
    }
    expected = train(Scheduled, 6, 5, **options)
    train(Saving, 6, 3, checkpoint_dir=tmp_path, checkpoint_every=Steps(1), **options)
    model, optimizers, data = make_parts()
    parts: dict[str, Any] = {"seed": 0, "default_callbacks": (), "checkpoint_dir": tmp_path, "resume": True, **options}
    trainer = Saving(model, optimizer=optimizers, **parts)
    rates: list[list[float]] = []

    class Record(Callback[Scheduled]):
        @override
        def on_step_start(self, trainer: Scheduled) -> None:
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer.callbacks = [Record()]
    trainer.train(data, max_steps=5, per_device_batch_size=6)
    assert [value for pair in rates for value in pair] == pytest.approx([0.005, 1e-5, 0.0025, 1e-6])
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert list(trainer.schedulers) == ["generator", "critic"]


def test_a_schedule_of_an_unknown_optimizer_is_refused() -> None:
    model, optimizers, _ = make_parts()
    options: dict[str, Any] = {"create_scheduler": StepLR.__init__, "create_scheduler_of": {"critics": print}}
    with pytest.raises(OptionError, match=r"create_scheduler_of={'critics': .*: the optimizers are generator, critic"):
        Scheduled(model, optimizer=optimizers, **options)


class Scaled(DCGAN):
    @override
    def make_engine(self) -> Engine:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return TorchEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots(), scaler)


def test_each_optimizer_has_a_gradient_scaler() -> None:
    model, optimizers, data = make_parts()
    trainer = Scaled(model, optimizer=optimizers, seed=0, max_grad_norm=math.inf, default_callbacks=())
    trainer.train(data, max_steps=8, per_device_batch_size=6)
    expected = train(DCGAN, 6, max_grad_norm=math.inf)
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())
    assert {"scaler.critic", "scaler.generator"} <= trainer.run.engine.get_state().shared.keys()


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda optimizers: pickle.loads(pickle.dumps(optimizers))])
def test_a_dict_of_optimizers_is_copied_with_its_names(copy_of: Callable[[OptimizerDict], OptimizerDict]) -> None:
    _, optimizers, _ = make_parts()
    copied = copy_of(optimizers)
    assert list(copied) == ["generator", "critic"]
    assert [group["lr"] for group in copied.param_groups] == [0.01, 0.01]


def test_a_search_for_a_learning_rate_has_no_schedule_of_any_optimizer() -> None:
    model, optimizers, data = make_parts()

    def fail(*_: object) -> Any:
        raise AssertionError("a search has a constant learning rate")

    trainer = Scheduled(
        model, optimizer=optimizers, create_scheduler=fail, create_scheduler_of={"critic": fail}, default_callbacks=()
    )
    assert find_learning_rate(trainer, data, steps=20).rates


class Global(SyncBatchNormMixin, Loop):
    """Depends on the batches of all processes: by its batch norm, and by the rows that it gathers."""

    @override
    def train_updates(self, batch: Images) -> Iterator[Update[Tensor]]:
        real, noise = batch
        false, critic = self.model.generator(noise), self.model.critic
        yield Update("critic", loss=real_loss(critic(real)) + false_loss(critic(false.detach())))
        gathered, own = self.gather_with_grad(false)
        yield Update("generator", loss=functional.cross_entropy(false @ gathered.T, own) + real_loss(critic(false)))


def train_global(batch_size: int) -> dict[str, Tensor]:
    model, _, data = make_parts()
    model.critic.insert(1, nn.BatchNorm1d(8).double())
    optimizers = {name: SGD(module.parameters(), lr=0.1) for name, module in model.named_children()}
    trainer = Global(model, optimizer=OptimizerDict(optimizers), seed=0, default_callbacks=())
    trainer.train(data, num_epochs=2, per_device_batch_size=batch_size)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 5), (3, 3)])
def test_updates_may_depend_on_the_batches_of_all_processes(ranks: int, batch_size: int) -> None:
    whole = train_global(ranks * batch_size)
    for split in run_ranks(lambda: train_global(batch_size), ranks):
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, rtol=1e-12, atol=1e-12, msg=name)
