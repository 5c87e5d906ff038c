"""torchvision's MNIST and transforms, with `Trainer` called as other trainers are: the numbers of a plain loop."""

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import library, nn
from torch.optim import SGD
from torch.utils.data import Dataset, random_split

from ptacc import Trainer
from ptacc.testing import epoch_order


def import_torchvision() -> tuple[Any, Any]:
    """Return torchvision's datasets and transforms; skip the test if it is not installed.

    The wheel's operators need a CUDA build of torch. With another one, they are declared, and are not used here.
    """
    with suppress(RuntimeError):
        pytest.importorskip("torchvision")
        return pytest.importorskip("torchvision.datasets"), pytest.importorskip("torchvision.transforms")
    for name in ("nms", "qnms"):
        library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("torchvision.datasets"), pytest.importorskip("torchvision.transforms")


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as files of MNIST, with images of 28 x 28 pixels."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    large = np.kron(images.reshape(-1, 8, 8), np.ones((1, 3, 3))) * 255 / 16
    pixels = np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, len(pixels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 2049, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + np.asarray(labels, np.uint8).tobytes())


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10), nn.LogSoftmax(dim=1))
    return nn.Sequential(nn.Flatten(), *layers)


def train_plainly(model: nn.Module, data: Dataset[tuple[torch.Tensor, int]], order: list[int]) -> None:
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    for start in range(0, len(order), 32):
        samples = [data[index] for index in order[start : start + 32]]
        outputs = model(torch.stack([image for image, _ in samples]))
        nn.functional.cross_entropy(outputs, torch.tensor([label for _, label in samples])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.timeout(120)
def test_a_run_on_mnist_files_has_the_weights_of_a_plain_loop(tmp_path: Path) -> None:
    datasets, transforms = import_torchvision()
    write_digits(tmp_path / "MNIST" / "raw")
    dataset = datasets.MNIST(str(tmp_path), download=True, transform=transforms.ToTensor())
    train, validation = random_split(dataset, [1497, 300])
    model, plain = make_model(), make_model()
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    trainer = Trainer(model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer)
    trainer.train(train_dataset=train, eval_dataset=validation, num_epochs=1, per_device_batch_size=32)
    train_plainly(plain, train, epoch_order(trainer.run.seed, 0, 1497))
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(weight, expected)
