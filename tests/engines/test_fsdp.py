"""FSDP2: the losses of one process, a restored model after the run, and errors."""

import contextlib
import copy
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD
from torch.testing._internal.distributed.fake_pg import FakeStore
from typing_extensions import override

from ptacc import (
    AMPMixin,
    FSDPMixin,
    GradCheckpointMixin,
    StepOutput,
    StepResult,
    SWAMixin,
    TensorParallelMixin,
    Trainer,
)
from ptacc.engines.fsdp import check_offload
from ptacc.errors import LaunchError, ModelError, OptionError
from ptacc.tensors.dtensor import is_dtensor, match_placement
from tests.engines.nets import Averaging, Block, Net, Usual, check_equal, digits, make, train
from tests.ranks import run_ranks


class Sharded(FSDPMixin, Usual): ...


class ShardedAveraging(FSDPMixin, Averaging): ...


@pytest.mark.parametrize("extra", [{}, {"fsdp_wrap": []}, {"fsdp_reshard_after_forward": False}])
def test_units_and_resharding_change_no_loss(extra: dict[str, Any]) -> None:
    check_equal(run_ranks(lambda: train(Sharded, **extra), 2), train(Usual))


@pytest.mark.parametrize(("replicas", "world_size"), [(2, 4), (2, 2)])
def test_replicas_of_the_shards_change_no_number(replicas: int, world_size: int) -> None:
    check_equal(run_ranks(lambda: train(Sharded, fsdp_replicas=replicas), world_size), train(Usual))


def test_averages_and_batch_norm_are_those_of_replicas() -> None:
    expected = run_ranks(lambda: train(Averaging, has_batch_norm=True), 2)
    check_equal(run_ranks(lambda: train(ShardedAveraging, has_batch_norm=True), 2), expected[0])


def test_a_single_process_trains_as_without_it() -> None:
    assert train(Sharded).losses == train(Usual).losses


# A difference in the last bit of float32 may be one of bfloat16 a step later, and that is 0.4 %.
@pytest.mark.parametrize(("mixin", "rtol"), [(AMPMixin, 1e-2), (GradCheckpointMixin, 1e-5), (SWAMixin, 1e-5)])
def test_it_combines_with_other_mixins(mixin: type[Any], rtol: float) -> None:
    options: dict[type[Any], dict[str, Any]] = {
        AMPMixin: {"mixed_precision": "bf16"},
        GradCheckpointMixin: {"gradient_checkpointing": [Block]},
        SWAMixin: {"swa_start": 1},
    }
    replicas = type("Replicas", (mixin, Usual), {})
    sharded = type("Sharded", (mixin, FSDPMixin, Usual), {})
    expected = run_ranks(lambda: train(replicas, has_batch_norm=True, **options[mixin]), 2)
    check_equal(run_ranks(lambda: train(sharded, has_batch_norm=True, **options[mixin]), 2), expected[0], rtol=rtol)


def test_the_last_pass_of_averaged_weights_may_end_unevenly() -> None:
    options: dict[str, Any] = {"swa_start": 1, "has_batch_norm": True, "samples": 277}
    sharded, replicas = type("Sharded", (SWAMixin, FSDPMixin, Usual), {}), type("Replicas", (SWAMixin, Usual), {})
    expected = run_ranks(lambda: train(replicas, **options), 2)
    check_equal(run_ranks(lambda: train(sharded, **options), 2), expected[0])


# ---- the model


class Observing(Sharded):
    """Records the model's classes and shards after a step."""

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        modules = self.unwrapped_model.modules()
        self.seen = {type(module).__name__ for module in modules if type(module).__name__.startswith("FSDP")}
        self.held = sum(p.to_local().numel() for p in self.unwrapped_model.parameters() if is_dtensor(p))

    seen: Any = ()
    held: int = 0


def parts(model: nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_func": nn.CrossEntropyLoss(),
        "default_callbacks": (),
    }


def shards_and_restores(units: Any) -> tuple[set[str], float]:
    model = make()
    before, named = {id(p) for p in model.parameters()}, dict(model.named_parameters())
    looks = [(type(module), set(vars(module))) for module in model.modules()]
    trainer = Observing(**parts(model), fsdp_wrap=units)
    trainer.train(digits(), num_epochs=1, max_steps=2)
    assert {id(p) for p in model.parameters()} == before
    assert dict(model.named_parameters()).keys() == named.keys()
    assert [(type(module), set(vars(module))) for module in model.modules()] == looks
    assert all(p.grad is None for p in model.parameters())
    assert not any(is_dtensor(p) for slot in trainer.run.engine.slots for p in slot.parameters)  # the shards are freed
    state = trainer.optimizer.state[named["enter.weight"]]
    assert state["momentum_buffer"].shape == (33, 64)
    assert torch.equal(pickle.loads(pickle.dumps(model))(torch.ones(1, 64)), model(torch.ones(1, 64)))
    copy.deepcopy(model)(torch.ones(1, 64)).sum().backward()
    return trainer.seen, trainer.held / sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("units", "seen"),
    [
        (None, {"FSDPNet", "FSDPBlock"}),
        ([], {"FSDPNet"}),
        ([nn.Linear], {"FSDPNet", "FSDPLinear"}),
        (["blocks.*"], {"FSDPNet", "FSDPBlock"}),
    ],
)
def test_the_users_model_is_sharded_and_restored(units: Any, seen: set[str]) -> None:
    for types, share in run_ranks(shards_and_restores, 2, units):
        assert types == seen
        assert 0.4 < share < 0.6


def test_a_models_own_list_of_units_is_used() -> None:
    def classes() -> set[str]:
        model = make()
        vars(model)["_no_split_modules"] = ["Linear"]  # as in models of transformers
        trainer = Observing(**parts(model))
        trainer.train(digits(), num_epochs=1, max_steps=1)
        seen: set[str] = trainer.seen
        return seen

    assert run_ranks(classes, 2) == [{"FSDPNet", "FSDPLinear"}] * 2


def train_twice_sharded() -> tuple[list[str], list[float]]:
    model = make()
    trainer = ShardedAveraging(**parts(model), fsdp_unshard_after_run=False)
    first = trainer.train(digits(), num_epochs=1)
    kinds = [type(p).__name__ for p in model.parameters()]
    evaluated = trainer.evaluate(digits(70)).loss
    again = trainer.train(digits(), num_epochs=1)
    return kinds, [evaluated, *(step.loss for step in (*first.steps, *again.steps))]


def train_twice_restored() -> list[float]:
    trainer = ShardedAveraging(**parts(make()))
    first = trainer.train(digits(), num_epochs=1)
    evaluated = trainer.evaluate(digits(70)).loss
    again = trainer.train(digits(), num_epochs=1)
    return [evaluated, *(step.loss for step in (*first.steps, *again.steps))]


def test_a_model_that_stays_sharded_evaluates_and_trains_again() -> None:
    (kinds, numbers), _ = run_ranks(train_twice_sharded, 2)
    assert set(kinds) == {"DTensor"}
    assert numbers == pytest.approx(run_ranks(train_twice_restored, 2)[0])


def fail_in_a_step() -> list[str]:
    class Failing(Sharded):
        fails: bool = True

        @override
        def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
            output = super().train_step(batch)
            if self.fails and self.progress.steps == 3:
                raise KeyError("on all ranks")
            return output

    trainer = Failing(**parts(make()))
    with pytest.raises(Exception, match=r"on all ranks"):
        trainer.train(digits(), num_epochs=1)
    return [type(p).__name__ for p in trainer.model.parameters()]


def test_after_an_exception_the_model_stays_sharded() -> None:
    for kinds in run_ranks(fail_in_a_step, 2):
        assert set(kinds) == {"DTensor"}


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_wrap": "blocks.*"}, r"fsdp_wrap='blocks\.\*'\): must be a list"),
        ({"fsdp_wrap": [3]}, "3 is neither a class of modules nor a name"),
        ({"fsdp_replicas": 0}, r"fsdp_replicas=0\): must be an integer of at least 1"),
        ({"fsdp_param_dtype": torch.int64}, r"fsdp_param_dtype=torch.int64\): must be a floating dtype"),
        ({"fsdp_reduce_dtype": "bf16"}, "fsdp_reduce_dtype='bf16'"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sharded(**{**parts(make()), **options})


def error_message(options: dict[str, Any]) -> str:
    with pytest.raises((OptionError, ModelError, LaunchError)) as refused:
        Sharded(**parts(make()), **options).train(digits(), num_epochs=1)
    return str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload=True) on a CPU"),
        (
            {"fsdp_replicas": 3},
            "(fsdp_replicas=3): 2 processes take batches of their own",
        ),
        ({"fsdp_wrap": ["bloks.*"]}, "Did you mean `blocks"),
    ],
)
def test_errors_at_the_start_of_a_run_are_raised_on_all_ranks(options: dict[str, Any], message: str) -> None:
    for said in run_ranks(error_message, 2, options):
        assert message in said


def test_replicas_of_the_shards_are_refused_with_tensor_parallelism() -> None:
    class Split(TensorParallelMixin, Sharded):
        tensor_parallel_size: int | None = 2

    def error_message() -> str:
        trainer = Split(**parts(make()), fsdp_replicas=2, tensor_parallel_plan={"leave": "colwise_gather_output"})
        with pytest.raises(LaunchError) as refused:
            trainer.train(digits(), num_epochs=1)
        return str(refused.value)

    for said in run_ranks(error_message, 2):
        assert "(fsdp_replicas=2): 2 processes share a replica of the model by tensor parallelism" in said


@pytest.fixture
def cpu_mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "is_refused"), [("cuda:fake", True), ("cuda:fake,cpu:gloo", False)])
def test_offloading_needs_a_process_group_on_the_host(backend: str, is_refused: bool) -> None:
    dist.init_process_group(backend, rank=0, world_size=1, store=FakeStore() if is_refused else HashStore())
    try:
        refusal = pytest.raises(LaunchError, match=r"communicates on cuda only\. Write in configure_accelerator")
        with refusal if is_refused else contextlib.nullcontext():
            check_offload("MyTrainer")
    finally:
        dist.destroy_process_group()


def test_loaded_states_lie_where_the_shards_of_the_parameter_lie(cpu_mesh: DeviceMesh) -> None:
    parameter = distribute_tensor(torch.ones(4), cpu_mesh, [Shard(0)])
    assert match_placement(parameter, torch.ones(4)).to_local().device.type == "cpu"
    offloaded: Any = parameter.to("meta")  # off the device of its mesh
    assert match_placement(offloaded, torch.ones(4)).to_local().device.type == "meta"


def test_a_launch_of_fsdp_1_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(LaunchError, match="FSDP of version 1, and Sharded shards by version 2"):
        Sharded(**parts(make())).train(digits(), num_epochs=1)


def losses_as_launched() -> list[float]:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    losses = train(Sharded).losses
    del os.environ["ACCELERATE_USE_FSDP"]
    assert train(Usual).losses == pytest.approx(losses, rel=1e-5)  # the launch has changed nothing in the process
    return losses


def test_the_options_of_the_launch_apply() -> None:
    assert run_ranks(losses_as_launched, 2)[0] == pytest.approx(train(Usual).losses, rel=1e-5)


def test_a_trainer_without_the_mixin_rejects_such_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LaunchError, match="it needs FSDPMixin"):
        Trainer(**parts(Net())).train(digits(), num_epochs=1)
