"""The search for a batch size keeps the global batch, agrees on all ranks, and leaves no trace."""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from ptacc import (
    FSDPMixin,
    GradAccumMixin,
    SyncBatchNormMixin,
    Trainer,
)
from ptacc.errors import DataError, ModelError, OptionError, RankFailedError
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning import BatchSizeSearch, find_batch_size
from tests.ranks import run_ranks


class Accumulating(GradAccumMixin, Trainer): ...


class Small(nn.Module):
    """A model that runs out of memory above a number of samples, which is smaller if there are gradients."""

    def __init__(self, capacity: int, with_gradients: int | None = None) -> None:
        super().__init__()
        self.body: nn.Linear = tiny_parts()["model"]
        self.capacities: tuple[int, ...] = capacity, capacity if with_gradients is None else with_gradients
        self.sizes: list[int] = []

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        has_gradients = any(parameter.grad is not None for parameter in self.parameters())
        if len(inputs) > self.capacities[has_gradients]:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried {len(inputs)} samples.\nMore of it.")
        outputs: Tensor = self.body(inputs)
        return outputs


def make(model: nn.Module, **options: Any) -> Accumulating:
    parts: dict[str, Any] = tiny_parts() | {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.01)}
    return Accumulating(**parts, **options)


# ---- results


@pytest.mark.parametrize(
    ("capacity", "global_batch", "size", "batches"),
    [(100, 24, 24, 1), (23, 24, 12, 2), (5, 24, 4, 6), (1, 7, 1, 7), (9, 30, 6, 5)],
)
def test_the_largest_batch_that_fits_and_divides_the_global_one(
    capacity: int, global_batch: int, size: int, batches: int
) -> None:
    found = find_batch_size(make(Small(capacity)), tiny_data(), global_batch_size=global_batch)
    assert (found.per_device_batch_size, found.gradient_accumulation_steps, found.processes) == (size, batches, 1)


def test_sizes_that_did_not_fit_are_reported() -> None:
    found = find_batch_size(make(Small(5)), tiny_data(), global_batch_size=12)
    assert found.did_not_fit == {
        12: "rank 0: CUDA out of memory. Tried 12 samples.",
        6: "rank 0: CUDA out of memory. Tried 6 samples.",
    }


def test_batches_after_the_first_of_a_step_find_gradients_in_memory() -> None:
    found = find_batch_size(make(Small(12, with_gradients=4)), tiny_data(), global_batch_size=24)
    assert found.per_device_batch_size == 4


def test_a_batch_that_is_a_full_step_finds_no_gradients() -> None:
    found = find_batch_size(make(Small(24, with_gradients=4)), tiny_data(), global_batch_size=24)
    assert found.per_device_batch_size == 24


def test_steps_are_full_with_fewer_samples_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTACC_LIMIT_BATCHES", "1")
    model = Small(30)
    find_batch_size(make(model), tiny_data(7), global_batch_size=60, steps=2)
    assert model.sizes == [60, 30, 30, 30, 30]


def test_training_with_what_was_found_is_the_same_training() -> None:
    unsplit, split = make(Small(100)), make(Small(5))
    losses = [step.loss for step in unsplit.train(tiny_data(), num_epochs=3, per_device_batch_size=12).steps]
    found = find_batch_size(split, tiny_data(), global_batch_size=12)
    split.gradient_accumulation_steps = found.gradient_accumulation_steps
    vars(split)["make_seed"] = vars(unsplit)["make_seed"] = lambda: unsplit.run.seed
    history = split.train(tiny_data(), num_epochs=3, per_device_batch_size=found.per_device_batch_size)
    assert found.gradient_accumulation_steps == 3
    assert [step.loss for step in history.steps] == pytest.approx(losses, rel=1e-12)


class Collating:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(samples))
        return torch.stack([inputs for inputs, _ in samples]), torch.tensor([target for _, target in samples])


def test_the_collate_function_makes_the_batches() -> None:
    collate = Collating()
    data = [(torch.ones(4, dtype=torch.float64), index % 2) for index in range(9)]
    found = find_batch_size(make(Small(5)), data, collate_fn=collate, global_batch_size=6, steps=2)
    assert found.per_device_batch_size == 3
    assert collate.sizes == [6, 3, 3, 3, 3]


# ---- errors that mean that memory ran out


class Failing(Small):
    """Raises the given error in its backward pass, above its capacity."""

    def __init__(self, capacity: int, error: Exception) -> None:
        super().__init__(100)
        self.limit, self.error = capacity, error

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        if len(inputs) > self.limit:
            self.body.weight.register_hook(self.fail)  # type: ignore[no-untyped-call]  # torch leaves it so
        return outputs

    def fail(self, gradient: Tensor) -> None:
        if self.sizes[-1] > self.limit:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(
            "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous"
        ),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        MemoryError(),
    ],
)
def test_every_out_of_memory_error_is_recognised_and_leaves_no_trace(error: Exception) -> None:
    trainer = make(Failing(4, error))
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=4)
    before = [str(value) for value in (trainer.model.state_dict(), trainer.optimizer.state_dict())]
    state = torch.get_rng_state()
    assert find_batch_size(trainer, tiny_data(), global_batch_size=12).per_device_batch_size == 4
    assert [str(value) for value in (trainer.model.state_dict(), trainer.optimizer.state_dict())] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.grad for parameter in trainer.model.parameters()] == [None, None]
    assert trainer.gradient_accumulation_steps == 1


def test_any_other_error_is_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        find_batch_size(make(Failing(4, RuntimeError("shapes cannot be multiplied"))), tiny_data(), global_batch_size=8)


def test_a_model_that_does_not_fit_at_all_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"batches of one sample does not fit in memory: rank 0: CUDA out of memory"):
        find_batch_size(make(Small(0)), tiny_data(), global_batch_size=4)


# ---- memory that really runs out


class Wide(nn.Module):
    """Takes at least 8 MB for each sample: 4 for its activations, and as much for their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        wide = (inputs[:, :1] * self.weight).expand(-1, 1_000_000).exp()
        return wide.mean(dim=1, keepdim=True).expand(-1, 2)


def search_with_memory(megabytes: int, spare: int) -> BatchSizeSearch:
    """Search with some megabytes in addition to those in use. `spare` of them have to stay free."""
    torch.set_num_threads(1)
    data = TensorDataset(torch.ones(8, 4), torch.zeros(8, dtype=torch.int64))
    model = Wide()
    parts: dict[str, Any] = {"model": model, "loss_func": nn.CrossEntropyLoss(), "default_callbacks": ()}
    trainer = Accumulating(**parts, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train(data, num_epochs=1, per_device_batch_size=1)  # allocates what is loaded only once
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    allowed = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))
    return find_batch_size(trainer, data, global_batch_size=32, steps=2, margin=spare * 2**20 / allowed)


def search_in_new_process(megabytes: int, spare: int) -> BatchSizeSearch:
    """Search where nothing is left of other tests: a fork would have free memory that the limit does not count."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(search_with_memory, megabytes, spare).result(timeout=120)


def test_real_lack_of_memory_is_detected() -> None:
    little, more = search_in_new_process(100, 0), search_in_new_process(400, 0)
    assert "can't allocate memory" in little.did_not_fit[32]
    assert 8 * little.per_device_batch_size < 100
    assert little.per_device_batch_size < more.per_device_batch_size


def test_a_margin_stays_free() -> None:
    without, with_margin = search_in_new_process(400, 0), search_in_new_process(400, 250)
    assert with_margin.per_device_batch_size < without.per_device_batch_size


# ---- several processes


def search_on_ranks(*capacities: int) -> BatchSizeSearch:
    model = Small(10**6)
    trainer = make(model)
    model.capacities = (capacities[trainer.distributed.rank],) * 2
    found = find_batch_size(trainer, tiny_data(), global_batch_size=24)
    model.capacities = (10**6, 10**6)
    trainer.gradient_accumulation_steps = found.gradient_accumulation_steps
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=found.per_device_batch_size)
    assert trainer.progress.steps == 1
    return found


def test_ranks_agree_where_one_alone_runs_out_and_train_together_after_it() -> None:
    first, second = run_ranks(search_on_ranks, 2, 100, 5)
    assert first == second
    assert (first.per_device_batch_size, first.gradient_accumulation_steps, first.processes) == (4, 3, 2)
    assert first.did_not_fit[12] == "rank 1: CUDA out of memory. Tried 12 samples."


class Synchronised(SyncBatchNormMixin, Accumulating): ...


class Normed(Small):
    def __init__(self) -> None:
        super().__init__(10**6)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.norm(inputs))


def search_with_collectives_in_the_forward() -> int:
    model = Normed()
    parts: dict[str, Any] = tiny_parts() | {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    trainer = Synchronised(**parts)
    model.capacities = ((100, 5)[trainer.distributed.rank],) * 2
    return find_batch_size(trainer, tiny_data(), global_batch_size=24).per_device_batch_size


def test_norms_that_see_the_global_batch_do_not_wait_for_a_rank_that_ran_out() -> None:
    assert run_ranks(search_with_collectives_in_the_forward, 2) == [4, 4]


def search_that_fails_on_one_rank() -> str:
    model = Failing(4, RuntimeError("a mistake"))
    trainer = make(model)
    model.limit = (100, 4)[trainer.distributed.rank]
    try:
        find_batch_size(trainer, tiny_data(), global_batch_size=12)
    except (RuntimeError, RankFailedError) as error:
        model.limit = 100
        trainer.train(tiny_data(), num_epochs=1)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_another_error_on_one_rank_is_raised_on_all_ranks_which_can_continue() -> None:
    first, second = run_ranks(search_that_fails_on_one_rank, 2)
    assert second == "RuntimeError: a mistake"
    assert first.startswith("RankFailedError: rank 1 failed in a try of find_batch_size()")
    assert first.endswith("RuntimeError: a mistake")


# ---- invalid arguments


@pytest.mark.parametrize("options", [{"global_batch_size": 0}, {"steps": 1}, {"margin": 1.0}, {"margin": -0.1}])
def test_numbers_out_of_range_are_invalid(options: dict[str, Any]) -> None:
    (name,) = options
    call: dict[str, Any] = {"global_batch_size": 8} | options
    with pytest.raises(OptionError, match=f"find_batch_size.{name}="):
        find_batch_size(make(Small(9)), tiny_data(), **call)


def search_of_an_odd_size() -> str:
    with pytest.raises(OptionError) as raised:
        find_batch_size(make(Small(9)), tiny_data(), global_batch_size=25)
    return str(raised.value)


def test_a_global_batch_that_cannot_be_split_is_invalid_on_all_ranks() -> None:
    for message in run_ranks(search_of_an_odd_size, 2):
        assert message.endswith("Give a multiple of 2, such as 26.")


def test_a_trainer_that_cannot_accumulate_is_invalid() -> None:
    with pytest.raises(OptionError, match="Compose GradAccumMixin"):
        find_batch_size(Trainer(**tiny_parts()), tiny_data(), global_batch_size=8)


class Sharded(FSDPMixin, Accumulating): ...


def search_in_shards() -> str:
    with pytest.raises(OptionError) as raised:
        find_batch_size(Sharded(**tiny_parts()), tiny_data(), global_batch_size=8)
    return str(raised.value)


def test_sharded_weights_are_invalid_on_all_ranks() -> None:
    for message in run_ranks(search_in_shards, 2):
        assert "the weights of Sharded are sharded over the processes" in message


def test_a_loader_is_invalid() -> None:
    data: Any = DataLoader(tiny_data())
    with pytest.raises(DataError, match=r"train_dataset=DataLoader\(...\)"):
        find_batch_size(make(Small(9)), data, global_batch_size=8)
