"""DeepSpeed: the losses of one process in every stage, a restored model after the run, exact resume, and errors."""

import copy
import gc
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from typing_extensions import override

from ptacc import (
    AMPMixin,
    CheckpointMixin,
    CompileMixin,
    DeepSpeedMixin,
    EarlyStoppingMixin,
    EMAMixin,
    Epochs,
    FSDPMixin,
    GradCheckpointMixin,
    LRSchedulerMixin,
    RestoreBestWeights,
    RunPlan,
    StepOutput,
    StepResult,
    StopOnNonFinite,
    SWAMixin,
    SyncBatchNormMixin,
    Trainer,
)
from ptacc.errors import CheckpointError, CompositionError, LaunchError, ModelError, OptionError
from ptacc.protocols import ResumeState, ZeroStage
from tests.engines.nets import Averaging, Block, Net, Usual, check_equal, digits, make, make_optimizer, train
from tests.marks import DEEPSPEED
from tests.ranks import find_free_port, launch, run_ranks

pytestmark = DEEPSPEED
prove = pytest.mark.prove
HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


class Deep(DeepSpeedMixin, Usual): ...


class DeepAveraging(DeepSpeedMixin, Averaging): ...


class DeepSaving(CheckpointMixin, Deep): ...


def parts(model: nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_func": nn.CrossEntropyLoss(),
        "default_callbacks": (),
    }


# ---- numbers


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        pytest.param(1, {"zero_offload_optimizer": True}, marks=prove),
        pytest.param(2, {"zero_offload_optimizer": True}, marks=prove),
        (3, {"zero_offload_optimizer": True, "zero_offload_param": True}),
        pytest.param(
            3, {"deepspeed_config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}, marks=prove
        ),
        pytest.param(3, {"deepspeed_config": {"zero_optimization": {"sub_group_size": 1000}}}, marks=prove),
        pytest.param(2, {"deepspeed_config": {"zero_optimization": {"reduce_bucket_size": 60}}}, marks=prove),
        pytest.param(2, {"deepspeed_config": {"zero_optimization": {"overlap_comm": True}}}, marks=prove),
    ],
)
def test_the_device_of_partitions_changes_no_number(stage: int, options: dict[str, Any]) -> None:
    check_equal(run_ranks(lambda: train(Deep, zero_stage=stage, **options), 2), train(Usual))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=prove), pytest.param(1, marks=prove), 2])
def test_averages_and_batch_norm_are_those_of_replicas(stage: int) -> None:
    expected = run_ranks(lambda: train(Averaging, has_batch_norm=True), 2)
    check_equal(run_ranks(lambda: train(DeepAveraging, has_batch_norm=True, zero_stage=stage), 2), expected[0])


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.05, total_steps=plan.total_steps)


OPTIONS: Mapping[type[Any], Mapping[str, Any]] = {
    AMPMixin: {"mixed_precision": "bf16"},
    GradCheckpointMixin: {"gradient_checkpointing": [Block]},
    SWAMixin: {"swa_start": 1},
    SyncBatchNormMixin: {},
    CompileMixin: {"compile_backend": "eager"},
    LRSchedulerMixin: {"create_scheduler": one_cycle},
    EarlyStoppingMixin: {"early_stopping_monitor": "eval_loss"},
}


# A difference in the last bit of float32 may be one of bfloat16 a step later, and that is 0.4 %.
@pytest.mark.parametrize(
    ("mixin", "stage", "rtol"),
    [
        (AMPMixin, 3, 2e-2),
        pytest.param(AMPMixin, 0, 2e-2, marks=prove),
        pytest.param(AMPMixin, 2, 2e-2, marks=prove),
        (GradCheckpointMixin, 3, 1e-5),
        pytest.param(GradCheckpointMixin, 2, 1e-5, marks=prove),
        pytest.param(SyncBatchNormMixin, 3, 1e-5, marks=prove),
        (SWAMixin, 2, 1e-5),
        pytest.param(CompileMixin, 2, 1e-5, marks=prove),
        (LRSchedulerMixin, 3, 1e-5),
        pytest.param(LRSchedulerMixin, 1, 1e-5, marks=prove),
        pytest.param(EarlyStoppingMixin, 3, 1e-5, marks=prove),
    ],
)
def test_it_combines_with_other_mixins(mixin: type[Any], stage: int, rtol: float) -> None:
    replicas, deep = type("Replicas", (mixin, Usual), {}), type("Deep", (mixin, DeepSpeedMixin, Usual), {})
    norm = mixin is not CompileMixin  # dynamo does not trace how DDP broadcasts buffers
    expected = run_ranks(lambda: train(replicas, has_batch_norm=norm, **OPTIONS[mixin]), 2)
    got = run_ranks(lambda: train(deep, has_batch_norm=norm, zero_stage=stage, **OPTIONS[mixin]), 2)
    check_equal(got, expected[0], rtol=rtol)


class HalvingHook(Usual):
    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        weight: Any = self.unwrapped_model.get_parameter("enter.weight")
        weight.register_hook(lambda gradient: gradient / 2)


class DeepHalvingHook(DeepSpeedMixin, HalvingHook): ...


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=prove) for stage in (0, 1, 2)), 3])
def test_hooks_on_gradients_and_clipping_by_value_work(stage: int) -> None:
    got = run_ranks(lambda: train(DeepHalvingHook, optimizer="sgd", max_grad_value=0.01, zero_stage=stage), 2)
    check_equal(got, train(HalvingHook, optimizer="sgd", max_grad_value=0.01))


BF16_WEIGHTS = {"bf16": {"enabled": True}}


class DeepAMP(AMPMixin, Deep):
    mixed_precision: Any = "bf16"


@prove
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_in_bfloat16_are_updated_in_float32(stage: int) -> None:
    numbers = run_ranks(lambda: train(DeepAMP, zero_stage=stage, deepspeed_config=BF16_WEIGHTS), 2)
    expected = train(type("AMP", (AMPMixin, Usual), {}), mixed_precision="bf16")
    for one in numbers:
        assert {tensor.dtype for tensor in one.weights.values()} == {torch.float32}
        assert one.losses == pytest.approx(expected.losses, rel=0.05)
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in one.weights.values())


def programs_started_by_steps(stage: ZeroStage) -> list[int]:
    started, by_step = list[str](), list[int]()
    sys.addaudithook(lambda event, _: started.append(event) if event == "subprocess.Popen" else None)

    class Watching(Deep):
        @override
        def on_step_end(self, step: StepResult) -> None:
            super().on_step_end(step)
            by_step.append(len(started))

    Watching(**parts(make()), zero_stage=stage).train(digits(), max_steps=4, per_device_batch_size=6)
    return [count - by_step[0] for count in by_step]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=prove) for stage in (0, 1, 2)), 3])
def test_a_step_starts_no_program_and_leaves_no_shared_memory(stage: ZeroStage) -> None:
    before = set(Path("/dev/shm").glob("deepspeed*"))
    assert run_ranks(programs_started_by_steps, 2, stage) == [[0] * 4] * 2
    assert set(Path("/dev/shm").glob("deepspeed*")) == before


def losses_with_a_nan(stage: ZeroStage) -> tuple[str, list[float]]:
    class Diverging(Deep):
        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            output = super().train_step(batch)
            return StepOutput(output.loss * (math.nan if self.progress.steps == 2 else 1), output.outputs)

    options: dict[str, Any] = parts(make()) | {"default_callbacks": (StopOnNonFinite(),)}
    trainer = Diverging(**options, zero_stage=stage)
    history = trainer.train(digits(), max_steps=20, per_device_batch_size=6)
    return history.stop_reason or "", [step.loss for step in history.steps]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=prove), pytest.param(2, marks=prove), 3])
def test_a_non_finite_loss_ends_the_run(stage: ZeroStage) -> None:
    for reason, losses in run_ranks(losses_with_a_nan, 2, stage):
        assert "non-finite loss" in reason
        assert math.isnan(losses[2])
        assert len(losses) < 20


# ---- one process


def test_a_process_that_no_launcher_started_trains_as_without_it() -> None:
    assert train(Deep, zero_stage=3).losses == train(Usual).losses


def seen_model() -> tuple[list[float], str]:
    class Observing(Deep):
        seen: str = ""

        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            type(self).seen = type(self.model).__module__
            return super().train_step(batch)

    return train(Observing, zero_stage=3, zero_offload_optimizer=True).losses, Observing.seen


def test_a_single_process_that_a_launcher_started_has_deepspeed() -> None:
    [(losses, seen)] = run_ranks(seen_model, 1)
    assert seen.startswith("deepspeed.")
    assert losses == pytest.approx(train(Usual).losses, rel=1e-5)


def test_offloading_without_a_launcher_raises() -> None:
    with pytest.raises(LaunchError, match=r"DeepSpeed needs a launcher, also for one process: `torchrun"):
        train(Deep, zero_offload_optimizer=True)


# ---- the model and the optimizer are the user's


def describe_attributes(model: nn.Module) -> list[Any]:
    return [
        (
            name,
            type(module),
            set(vars(module)),
            type(vars(module)["_parameters"]),
            [len(getattr(module, h)) for h in HOOKS],
        )
        for name, module in model.named_modules()
    ]


def two_runs(kind: type[Usual], **options: Any) -> tuple[list[float], dict[str, Any]]:
    model = make(has_batch_norm=True)
    looks, parameters = describe_attributes(model), list(model.parameters())
    trainer = kind(
        model, loss_func=nn.CrossEntropyLoss(), optimizer=make_optimizer(model), default_callbacks=(), **options
    )
    histories = []
    for _ in range(2):
        histories.append(trainer.train(digits(), digits(70), num_epochs=1, max_steps=7, per_device_batch_size=6))
        assert describe_attributes(model) == looks
        assert [*map(id, model.parameters())] == [*map(id, parameters)]
        assert [*map(id, trainer.optimizer.param_groups[0]["params"])] == [*map(id, parameters)]
        assert all(p.grad is None and not vars(p) for p in parameters)
        assert torch.equal(pickle.loads(pickle.dumps(model)).enter.weight, model.enter.weight)
        copy.deepcopy(model)(torch.ones(2, 64)).sum().backward()
    losses = [step.loss for history in histories for step in history.steps]
    names = {name: trainer.optimizer.state[parameter] for name, parameter in model.named_parameters()}
    return losses, {name: {key: value.clone() for key, value in state.items()} for name, state in names.items()}


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=prove) for stage in (0, 1)), 2, 3])
def test_model_and_optimizer_are_restored_after_each_of_two_runs(stage: int) -> None:
    losses, moments = run_ranks(lambda: two_runs(Usual), 2)[0]
    for got in run_ranks(lambda: two_runs(Deep, zero_stage=stage), 2):
        assert got[0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(got[1], moments, rtol=1e-4, atol=1e-6)


class Collecting(Deep):
    """Collects garbage in each step: DeepSpeed's engine of the run before is in a reference cycle."""

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        gc.collect()


def two_runs_without_collection() -> tuple[list[float], dict[str, Any]]:
    gc.disable()
    return two_runs(Collecting, zero_stage=2)


def test_the_engine_of_an_earlier_run_may_be_collected_during_a_run() -> None:
    losses, moments = run_ranks(lambda: two_runs(Usual), 2)[0]
    for got in run_ranks(two_runs_without_collection, 2):
        assert got[0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(got[1], moments, rtol=1e-4, atol=1e-6)


def train_two_trainers() -> tuple[list[float], ...]:
    plain, deep = Usual(**parts(make())), Deep(**parts(make()), zero_stage=3)
    runs = [trainer.train(digits(), max_steps=5, per_device_batch_size=6) for trainer in (deep, plain)]
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
    return tuple([step.loss for step in run.steps] for run in runs)


def test_a_plain_trainer_trains_afterwards_in_the_same_process() -> None:
    for deep, plain in run_ranks(train_two_trainers, 2):
        assert deep == pytest.approx(plain, rel=1e-5)


class Tied(nn.Module):
    """Has tied and frozen weights, for an optimizer of three groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.first, self.second = nn.Linear(64, 11), nn.Linear(11, 11), nn.Linear(11, 11)
        self.second.weight = self.first.weight
        self.frozen, self.leave = nn.Linear(11, 11).requires_grad_(requires_grad=False), nn.Linear(11, 10, bias=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(torch.tanh(self.enter(inputs)))))
        outputs: Tensor = self.leave(torch.tanh(self.frozen(hidden)))
        return outputs


def trained_tied(kind: type[Any], directory: Path, **options: Any) -> tuple[list[float], dict[str, Tensor], set[str]]:
    model = Tied()
    with_frozen = [model.second.bias, model.frozen.weight]
    groups: list[dict[str, Any]] = [
        {"params": [*model.enter.parameters(), *model.first.parameters()]},
        {"params": with_frozen},
        {"params": model.leave.weight, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=0.01)
    optimizer.state[model.frozen.weight] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(11, 11)}
    trainer = kind(**{**parts(model), "optimizer": optimizer}, checkpoint_dir=directory, **options)
    histories = [trainer.train(digits(), num_epochs=1, max_steps=6, per_device_batch_size=6) for _ in range(2)]
    trainer.load_checkpoint(directory / "run-2", weights_only=True)
    names = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    return [step.loss for history in histories for step in history.steps], dict(model.state_dict()), names


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=prove) for stage in (0, 1)), 2, 3])
def test_tied_and_frozen_weights_and_groups_are_restored(stage: int, tmp_path: Path) -> None:
    plain = type("Plain", (CheckpointMixin, Usual), {})
    losses, weights, names = run_ranks(lambda: trained_tied(plain, tmp_path / "plain"), 2)[0]
    for got in run_ranks(lambda: trained_tied(DeepSaving, tmp_path / "deep", zero_stage=stage), 2):
        assert got[0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(got[1], weights, rtol=1e-4, atol=1e-5)
        assert got[2] == names


# ---- checkpoints


Saved = tuple[list[float], dict[str, Tensor], list[dict[str, Any]]]


def saving(
    kind: type[Any], directory: Path, steps: int, *, resume: bool = False, has_batch_norm: bool = True, **options: Any
) -> Saved:
    model = make(has_batch_norm=has_batch_norm)
    if resume:
        nn.init.zeros_(model.enter.weight)
    trainer = kind(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=make_optimizer(model),
        default_callbacks=(),
        checkpoint_dir=directory,
        resume=resume,
        **options,
    )
    history = trainer.train(digits(), digits(70), num_epochs=2, max_steps=steps, per_device_batch_size=6)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = [{key: value.clone() for key, value in s.items()} for s in trainer.optimizer.state.values()]
    return [step.loss for step in history.steps], weights, states


def check_resumes(tmp_path: Path, kind: type[Any], **options: Any) -> None:
    whole = run_ranks(lambda: saving(kind, tmp_path / "whole", 20, **options), 2)
    run_ranks(lambda: saving(kind, tmp_path / "parts", 8, **options), 2)
    resumed = run_ranks(lambda: saving(kind, tmp_path / "parts", 20, resume=True, **options), 2)
    for there, here in zip(whole, resumed, strict=True):
        assert here[0] == there[0]
        torch.testing.assert_close(here[1:], there[1:], rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=prove), 2, 3])
def test_a_run_resumes_in_new_processes_to_the_last_bit(stage: int, tmp_path: Path) -> None:
    check_resumes(tmp_path, DeepSaving, zero_stage=stage)


@prove
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_bfloat16_weights_resumes_to_the_last_bit(stage: int, tmp_path: Path) -> None:
    kind = type("Saving", (CheckpointMixin, DeepAMP), {})
    check_resumes(tmp_path, kind, zero_stage=stage, deepspeed_config=BF16_WEIGHTS, has_batch_norm=False)


@prove
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_with_offloading_resumes_to_the_last_bit(stage: int, tmp_path: Path) -> None:
    check_resumes(tmp_path, DeepSaving, zero_stage=stage, zero_offload_optimizer=True)


def loaded(kind: type[Any], checkpoint: Path, export: Path) -> float:
    trainer = type("Loading", (CheckpointMixin, kind), {})(**parts(Net()), checkpoint_dir=export.parent / "unused")
    trainer.load_checkpoint(checkpoint, weights_only=True)
    trainer.export_model(export)
    return float(trainer.evaluate(digits(70)).loss)


def saved_and_evaluated(directory: Path, stage: ZeroStage) -> float:
    trainer = DeepSaving(**parts(make()), zero_stage=stage, checkpoint_dir=directory)
    history = trainer.train(digits(), digits(70), max_steps=5, per_device_batch_size=6)
    return history[-1].eval_loss or 0.0


@pytest.mark.parametrize("stage", [pytest.param(1, marks=prove), 3])
def test_checkpoints_load_as_weights_with_any_engine(stage: ZeroStage, tmp_path: Path) -> None:
    evaluated = run_ranks(saved_and_evaluated, 2, tmp_path / "run", stage)[0]
    plain = loaded(Trainer, tmp_path / "run", tmp_path / "plain.safetensors")
    sharded = type("Sharded", (FSDPMixin, Trainer), {})
    dealt = run_ranks(lambda: loaded(sharded, tmp_path / "run", tmp_path / "sharded.safetensors"), 2)
    assert [plain, *dealt] == pytest.approx([evaluated] * 3, rel=1e-5)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "sharded.safetensors").read_bytes()


class Exporting(DeepSaving):
    export: Path = Path()

    @override
    def on_run_end(self) -> None:
        self.export_model(self.export)
        super().on_run_end()


def exported_within(directory: Path) -> dict[str, Tensor]:
    trainer = Exporting(**parts(make()), zero_stage=3, checkpoint_dir=directory / "run", export=directory / "weights")
    trainer.train(digits(), max_steps=3, per_device_batch_size=6)
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_full_weights_are_exported_within_a_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = run_ranks(exported_within, 2, tmp_path)[0]
    torch.testing.assert_close(load_file(tmp_path / "weights"), weights, rtol=0, atol=0)


def error_of_resume(directory: Path, options: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as refused:
        saving(DeepSaving, directory, 20, resume=True, **options)
    return str(refused.value)


def test_a_run_resumes_with_the_same_stage_and_number_of_ranks_only(tmp_path: Path) -> None:
    run_ranks(lambda: saving(DeepSaving, tmp_path, 4, zero_stage=2), 2)
    there = "'deepspeed zero 2, 2 processes'"
    for said in run_ranks(error_of_resume, 2, tmp_path, {"zero_stage": 1}):
        assert f"engine was {there} and is 'deepspeed zero 1, 2 processes'" in said
    for said in run_ranks(error_of_resume, 2, tmp_path, {"zero_stage": 1, "resume_ignore": ["engine"]}):
        assert f"saved under {there}, and this is 'deepspeed zero 1, 2 processes'" in said
    [said] = run_ranks(error_of_resume, 1, tmp_path, {"zero_stage": 2})
    assert f"engine was {there} and is 'deepspeed zero 2, 1 processes'" in said


class Reordered(DeepSaving):
    """Has the optimizer's parameters in the opposite order, if they are not in a checkpoint's order."""

    @override
    def find_resume_state(self) -> ResumeState | None:
        if self.resume:
            self.optimizer.param_groups[0]["params"].reverse()
        return super().find_resume_state()


def test_partitions_of_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    def resume() -> str:
        with pytest.raises(CheckpointError) as refused:
            saving(Reordered, tmp_path, 20, resume=True, zero_stage=1)
        return str(refused.value)

    run_ranks(lambda: saving(Reordered, tmp_path, 4, zero_stage=1), 2)
    for said in run_ranks(resume, 2):
        assert "The optimizer's parameters are in another order" in said


def test_a_group_that_is_added_during_the_run_is_refused() -> None:
    class Growing(Deep):
        @override
        def on_epoch_start(self) -> None:
            super().on_epoch_start()
            self.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    def said() -> str:
        with pytest.raises(ModelError) as refused:
            Growing(**parts(make()), zero_stage=1).train(digits(), max_steps=1, per_device_batch_size=6)
        return str(refused.value)

    assert "A parameter group was added to the optimizer during the run" in run_ranks(said, 1)[0]


# ---- the configuration


FULL = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 6,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "overlap_comm": False},
}


def stage_trained_with(options: dict[str, Any]) -> tuple[list[float], str]:
    model = make()
    trainer = Deep(**parts(model), **options)
    history = trainer.train(digits(), num_epochs=2, max_steps=20, per_device_batch_size=6)
    return [step.loss for step in history.steps], trainer.run.invariants["engine"]


def test_a_configuration_is_read_from_a_file_and_completed(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(FULL))
    for losses, engine in run_ranks(stage_trained_with, 2, {"deepspeed_config": str(path)}):
        assert engine == "deepspeed zero 1, 2 processes"
        assert losses == pytest.approx(train(Usual, optimizer="sgd").losses, rel=1e-5)


def launched_with(environment: dict[str, str], options: dict[str, Any]) -> str:
    os.environ.update(ACCELERATE_USE_DEEPSPEED="true", **environment)
    return stage_trained_with(options)[1]


@pytest.mark.parametrize(
    ("options", "stage"),
    [({}, 3), pytest.param({"zero_stage": 1}, 1, marks=prove)],
)
def test_the_options_of_the_launch_apply(options: dict[str, Any], stage: int) -> None:
    environment = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    for engine in run_ranks(launched_with, 2, environment, options):
        assert engine == f"deepspeed zero {stage}, 2 processes"


def test_a_launch_with_other_gradient_clipping_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    with pytest.raises(LaunchError, match=r"ACCELERATE_GRADIENT_CLIPPING=1.0, and Deep has max_grad_norm=0.5"):
        train(Deep)


def accelerate_was_first() -> str:
    from accelerate.state import PartialState

    os.environ.update(ACCELERATE_USE_DEEPSPEED="true")
    del os.environ["ACCELERATE_USE_CPU"]
    PartialState(backend="gloo")
    return error_message(lambda: Deep(**parts(make())), (LaunchError,))


def test_an_accelerate_state_created_before_the_trainer_raises() -> None:
    for said in run_ranks(accelerate_was_first, 2):
        assert "Accelerate has set it up by itself, for an Accelerator or a PartialState" in said


SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
from tests.engines.nets import Usual, train
from ptacc import DeepSpeedMixin
class Deep(DeepSpeedMixin, Usual): ...
losses = train(Deep).losses
if os.environ["RANK"] == "0":
    print("losses", *losses)
sys.stdout.flush()
os._exit(0)
"""


@prove
def test_a_real_launch_trains(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = "--use_deepspeed --zero_stage 3 --num_processes 2 --mixed_precision no --gradient_accumulation_steps 2"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--num_machines", "1"]
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[2])}
    port = ["--main_process_port", str(find_free_port()), "--dynamo_backend", "no", str(script)]
    done = launch([*command, *port], environment, timeout=100)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("losses")] or [done.stderr]
    assert [float(word) for word in line.split()[1:]] == pytest.approx(train(Usual).losses, rel=1e-5)


def test_a_trainer_without_the_mixin_rejects_such_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LaunchError, match="it needs DeepSpeedMixin"):
        Trainer(**parts(Net())).train(digits(), num_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, r"zero_stage=4\): must be 0, 1, 2 or 3"),
        ({"zero_stage": 0, "zero_offload_optimizer": True}, r"zero_offload_optimizer=True\) with ZeRO 0"),
        ({"zero_stage": 2, "zero_offload_param": True}, "zero_offload_param=True.* Take zero_stage=3 or more"),
        ({"deepspeed_config": 3}, "must be a mapping, or the path of a JSON file"),
        ({"deepspeed_config": "nowhere.json"}, "nowhere.json'.* cannot be read"),
        ({"deepspeed_config": {"optimizer": {"type": "Adam"}}}, "sets optimizer. The trainer has one. Leave it out"),
        (
            {"deepspeed_config": {"torch_autocast": {"enabled": True}}},
            "sets torch_autocast. Precision is set by mixed_precision",
        ),
        (
            {"zero_stage": 3, "deepspeed_config": {"zero_optimization": {"stage": 2}}},
            r"zero_stage=3\), and the DeepSpeed configuration has zero_optimization.stage=2",
        ),
        (
            {"zero_stage": 3, "deepspeed_config": {"zero_optimization": {"offload_param": {"device": "nvme"}}}},
            "offload_param.device='nvme': must be",
        ),
        ({"deepspeed_config": {"gradient_accumulation_steps": 4}}, "steps=4, and the trainer .*steps=2"),
        (
            {"accumulation_schedule": {Epochs(1): 4}, "deepspeed_config": {"gradient_accumulation_steps": 2}},
            "steps=2, and the trainer .*steps=2, 4 after 1 epoch",
        ),
        ({"deepspeed_config": {"gradient_clipping": 1.0}}, "clipping=1.0, and the trainer max_grad_norm=0.5"),
        ({"deepspeed_config": {"bf16": {"enabled": True}}}, "bf16.enabled=True, and the trainer mixed_precision='no'"),
        ({"deepspeed_config": {"fp16": {"enabled": True}}}, "fp16.enabled=True, and the trainer mixed_precision='no'"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Deep(**parts(make()), **options).train(digits(), num_epochs=1)


def test_fp16_on_a_cpu_raises() -> None:
    with pytest.raises(OptionError, match='mixed_precision="fp16" on a CPU'):
        DeepAMP(**parts(make()), mixed_precision="fp16").train(digits(), num_epochs=1)


def test_a_second_engine_raises() -> None:
    with pytest.raises(CompositionError, match="DeepSpeedMixin and FSDPMixin both define make_engine"):
        type("Both", (DeepSpeedMixin, FSDPMixin, Trainer), {})


@pytest.mark.parametrize(
    ("mixin", "options", "message"),
    [
        (EMAMixin, {"ema_decay": 0.9}, "EMAMixin averages or copies the weights, and under ZeRO 3"),
        (SWAMixin, {"swa_start": 1}, "swa_start=1 averages or copies the weights, and under ZeRO 3"),
        (Usual, {"callbacks": [RestoreBestWeights("eval_loss")]}, "RestoreBestWeights averages or copies"),
        (CompileMixin, {}, "CompileMixin traces full parameters, and ZeRO 3 partitions them"),
    ],
)
def test_stage_3_rejects_what_needs_full_weights(mixin: type[Any], options: dict[str, Any], message: str) -> None:
    kind = type("Deep", (DeepSpeedMixin, mixin) if issubclass(mixin, Trainer) else (mixin, DeepSpeedMixin, Usual), {})
    with pytest.raises(OptionError, match=message):
        kind(**parts(make()), zero_stage=3, **options)


# ---- errors at the start of a run


def error_message(make_trainer: Callable[[], Any], kinds: tuple[type[Exception], ...]) -> str:
    """Return the message of the error, and check that the model is unchanged."""
    trainer = make_trainer()
    before = describe_attributes(trainer.model)
    with pytest.raises(kinds) as refused:
        trainer.train(digits(), num_epochs=1, per_device_batch_size=6)
    assert describe_attributes(trainer.model) == before
    assert all(p.numel() and not vars(p) for p in trainer.model.parameters())
    return str(refused.value)


def with_optimizer(optimizer: Callable[[nn.Module], Optimizer], **options: Any) -> Deep:
    model = make()
    given: dict[str, Any] = {**parts(model), "optimizer": optimizer(model), **options}
    return Deep(**given)


class Keeping(SGD):
    """Keeps the gradients of a step for the next one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None: ...


def with_trained_loss() -> Deep:
    loss = nn.Bilinear(10, 10, 1)
    return with_optimizer(lambda m: SGD([*m.parameters(), *loss.parameters()], lr=0.1), loss_func=loss)


def of_dtype(dtype: torch.dtype) -> Deep:
    return Deep(**parts(make().to(dtype)))


@pytest.mark.parametrize(
    ("make_trainer", "message"),
    [
        (
            lambda: with_optimizer(lambda m: Adafactor(m.parameters())),
            "Adafactor under ZeRO 2 may need full parameters",
        ),
        (with_trained_loss, "the optimizer has parameters of loss_func, and DeepSpeed trains those of the model only"),
        (lambda: with_optimizer(Keeping), "Keeping has a zero_grad of its own"),
        (
            lambda: with_optimizer(lambda m: AdamWScheduleFree(m.parameters())),
            "AdamWScheduleFree has a train mode and an eval mode",
        ),
        (lambda: of_dtype(torch.float64), "enter.weight is float64, and DeepSpeed updates weights in float32"),
        (lambda: of_dtype(torch.bfloat16), "enter.weight is bfloat16, and DeepSpeed"),
        (
            lambda: Deep(**parts(make()), deepspeed_config={"train_micro_batch_size_per_gpu": 4}),
            "train_micro_batch_size_per_gpu=4, and the trainer per_device_batch_size=6",
        ),
        (
            lambda: Deep(**parts(make()), deepspeed_config={"train_batch_size": 12}),
            "train_batch_size=12, and the trainer per_device_batch_size=6 x 2 batches a step x 2 processes",
        ),
    ],
)
def test_the_error_is_raised_on_all_ranks(make_trainer: Callable[[], Any], message: str) -> None:
    for said in run_ranks(lambda: error_message(make_trainer, (OptionError,)), 2):
        assert message in said


class Choosing(Deep):
    """Uses a part of the model in the loss, another one on each rank."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        weight = self.unwrapped_model.get_parameter(f"blocks.{self._distributed.rank}.linear.weight")
        return StepOutput(weight.sum(), output.outputs)


def choosing(stage: ZeroStage) -> str:
    trainer = Choosing(**parts(make()), zero_stage=stage)
    with pytest.raises(Exception, match="The loss does not depend on") as refused:
        trainer.train(digits(), num_epochs=1, per_device_batch_size=6)
    return str(refused.value)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=prove), 2])
def test_unused_parameters_are_named(stage: ZeroStage) -> None:
    for said in run_ranks(choosing, 2, stage):
        assert "The loss does not depend on enter.weight" in said


def without(variable: str, value: str, directory: str) -> str:
    os.environ.update({variable: value, "TORCH_EXTENSIONS_DIR": directory})
    return error_message(lambda: Deep(**parts(make())), (LaunchError,))


@pytest.mark.parametrize(
    ("variable", "message"),
    [("PATH", "install ninja"), ("CXX", "and a C++ compiler")],
)
def test_missing_build_tools_are_named(variable: str, message: str, tmp_path: Path) -> None:
    for said in run_ranks(without, 2, variable, str(tmp_path / "nowhere"), str(tmp_path)):
        assert message in said


def not_installed() -> str:
    sys.modules["deepspeed"] = None  # type: ignore[assignment]  # Python treats None as a missing module
    return error_message(lambda: Deep(**parts(make())), (LaunchError,))


def test_a_missing_installation_is_named() -> None:
    for said in run_ranks(not_installed, 2):
        assert "pip install 'ptacc[deepspeed]'" in said


def test_the_wrong_device_is_named() -> None:
    from ptacc.engines.deepspeed.checks import init_distributed

    with pytest.raises(LaunchError, match=r"computes on cpu, and this launch on cuda. Set DS_ACCELERATOR=cuda"):
        init_distributed(torch.device("cuda"))
