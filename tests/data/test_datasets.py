"""Rows and streams of `datasets` and loaders of torchdata train as torch's own, on one process and on several."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from ptacc import SeedMixin, StepOutput, TrainingLoop
from ptacc.errors import DataError
from ptacc.testing import iris_parts, iris_split
from tests.ranks import run_ranks

os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it


class Classifier(SeedMixin, TrainingLoop[dict[str, Tensor], Tensor]):
    @override
    def train_step(self, batch: dict[str, Tensor]) -> StepOutput[Tensor]:
        logits = self.model(batch["x"])
        return StepOutput(loss=nn.functional.cross_entropy(logits, batch["y"]), outputs=logits)


def make_trainer() -> Classifier:
    parts = iris_parts()
    del parts["loss_func"]
    return Classifier(**parts, seed=0)


def splits() -> Any:
    """Return irises as a `DatasetDict`."""
    from datasets import Dataset, DatasetDict

    parts = zip(("train", "validation"), iris_split(), strict=True)
    tables = {name: dict(zip("xy", (t.tolist() for t in part.tensors), strict=True)) for name, part in parts}
    return DatasetDict({name: Dataset.from_dict(table) for name, table in tables.items()}).with_format("torch")


def rows() -> Any:
    return splits()["train"]


def stream() -> Any:
    return rows().to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=30)


def tensors() -> StackDataset[Any]:
    columns: dict[str, Any] = dict(zip("xy", iris_split()[0].tensors, strict=True))
    return StackDataset(**columns)


def train(make_data: Callable[[], Any], batch_size: int | None = 8) -> list[float]:
    """Return the losses of 20 steps: a pass over the data and a third of one."""
    data = make_data()
    size = None if isinstance(data, DataLoader) else batch_size
    history = make_trainer().train(data, splits()["validation"], max_steps=20, per_device_batch_size=size)
    return [*(step.loss for step in history.steps), history[-1].eval_loss or 0.0]


def stateful(data: Any, workers: int = 0, *, shuffle: bool | None = None) -> StatefulDataLoader[Any]:
    batch_size = 8 // int(os.environ.get("WORLD_SIZE", "1"))
    return StatefulDataLoader(data, batch_size, shuffle=shuffle, num_workers=workers)


MAKERS: dict[str, Callable[[], Any]] = {
    "rows": rows,
    "a stream": stream,
    "a stateful loader of rows": lambda: stateful(rows(), shuffle=True),
    "a stateful loader of rows, with workers": lambda: stateful(rows(), 2, shuffle=True),
    "a stateful loader of a stream": lambda: stateful(stream()),
}


def test_rows_train_as_tensors_to_the_last_bit() -> None:
    assert train(rows) == train(tensors)


def test_a_stream_trains_as_a_list_of_its_samples() -> None:
    def samples() -> DataLoader[Any]:
        data = stream()
        first = list(data)
        data.set_epoch(1)
        both: Any = first + list(data)
        return DataLoader(both, batch_size=8)

    assert train(stream) == train(samples)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [rows, stream])
def test_a_stateful_loader_trains_as_one_of_torch(data: Callable[[], Any], workers: int) -> None:
    assert train(lambda: stateful(data(), workers)) == train(lambda: DataLoader(data(), 8, num_workers=workers))


def test_a_stateful_loader_that_shuffles_gives_each_sample_once_an_epoch() -> None:
    seen = list[Tensor]()

    class Seeing(Classifier):
        @override
        def on_batch_end(self, batch: dict[str, Tensor], output: StepOutput[Tensor]) -> None:
            super().on_batch_end(batch, output)
            seen.append(batch["x"])

    parts = iris_parts()
    del parts["loss_func"]
    Seeing(**parts).train(stateful(rows(), shuffle=True), num_epochs=1)
    torch.testing.assert_close(torch.cat(seen).sort(dim=0)[0], iris_split()[0].tensors[0].sort(dim=0)[0])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", list(MAKERS))
def test_two_processes_train_as_one(kind: str) -> None:
    first, second = run_ranks(lambda: train(MAKERS[kind], batch_size=4), 2)
    assert first == second
    assert first == pytest.approx(train(MAKERS[kind]), rel=1e-5)


def test_the_splits_of_a_dataset_dict_are_evaluated_by_name() -> None:
    results = make_trainer().evaluate({str(name): split for name, split in splits().items()})
    assert list(results) == ["train", "validation"]
    assert {name: result.loss for name, result in make_trainer().evaluate(splits()).items()} == {
        name: result.loss for name, result in results.items()
    }


def test_the_splits_of_a_dataset_dict_are_not_trained_on_together() -> None:
    with pytest.raises(DataError, match=r"a mapping \(DatasetDict\).*such as data\['train'\]"):
        make_trainer().train(splits(), num_epochs=1)


def test_predictions_are_in_the_order_of_the_rows() -> None:
    trainer, inputs = make_trainer(), iris_split()[0].tensors[0]
    torch.testing.assert_close(torch.stack(trainer.predict(rows())), trainer.model(inputs).detach())


def test_columns_are_not_a_dataset() -> None:
    columns: Any = {"x": torch.zeros(4, 2), "y": torch.zeros(4)}
    with pytest.raises(DataError, match=r"StackDataset\(\*\*columns\)"):
        make_trainer().train(columns, num_epochs=1)


def test_rows_of_lists_name_the_format_to_set() -> None:
    with pytest.raises(TypeError) as caught:
        make_trainer().train(rows().with_format(None), num_epochs=1)
    assert 'dataset.with_format("torch")' in "".join(caught.value.__notes__)
