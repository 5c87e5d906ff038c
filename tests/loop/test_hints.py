"""Messages of torch that are frequent in training get a hint. Each message is provoked, so that it is torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as f
from torch.utils.data import default_collate

from ptacc.loop.hints import find_hint

INPUTS, CLASSES, FLOATS = torch.ones(8, 4), torch.arange(8) % 3, torch.ones(8)
LOGITS = INPUTS[:, :3]
IMAGES = torch.zeros(2, 8, 8, 3)
LINEAR, CONVOLUTION = nn.Linear(4, 3), nn.Conv2d(3, 4, 3)


def backward_twice() -> None:
    loss = LINEAR(INPUTS).square().sum()
    loss.backward()
    loss.backward()


CASES: dict[str, tuple[Callable[[], object], str]] = {
    "ragged tensors": (lambda: default_collate([torch.ones(3), torch.ones(5)]), "The samples of a batch diffe"),
    "ragged lists": (lambda: default_collate([[1, 2], [1, 2, 3]]), "The samples of a batch diffe"),
    "None in a sample": (lambda: default_collate([None, None]), "values of type NoneType"),
    "a class in a sample": (lambda: default_collate([nn.Tanh(), nn.Tanh()]), "values of type Tanh"),
    "BCE, (n, 1) and (n,)": (lambda: f.binary_cross_entropy(LOGITS[:, :1], FLOATS), "targets.unsqueeze(1)"),
    "BCE with logits, (n, 1) and (n,)": (
        lambda: f.binary_cross_entropy_with_logits(LOGITS[:, :1], FLOATS),
        "targets.unsqueeze(1)",
    ),
    "MSE of other shapes": (lambda: f.mse_loss(LOGITS, FLOATS), "shapes that do not fit"),
    "cross-entropy of floats": (lambda: f.cross_entropy(LOGITS, FLOATS), "targets.long()"),
    "cross-entropy of int32": (lambda: f.cross_entropy(LOGITS, CLASSES.int()), "targets.long()"),
    "cross-entropy of (n, 1)": (lambda: f.cross_entropy(LOGITS, CLASSES[:, None]), "targets.squeeze(1)"),
    "cross-entropy of one-hot": (lambda: f.cross_entropy(LOGITS, f.one_hot(CLASSES, 3)), "targets.argmax(dim=1)"),
    "cross-entropy of fewer targets": (lambda: f.cross_entropy(LOGITS, CLASSES[:5]), "8 rows for 5 targets"),
    "class out of range": (lambda: f.cross_entropy(LOGITS, CLASSES + 3), "minus 1. Count classes from 0"),
    "class -1": (lambda: f.nll_loss(LOGITS, CLASSES - 1), "minus 1. Count classes from 0"),
    "BCE of integers": (lambda: f.binary_cross_entropy(LOGITS[:, 0], CLASSES), "targets.float()"),
    "BCE with logits of integers": (
        lambda: f.binary_cross_entropy_with_logits(LOGITS[:, 0], CLASSES),
        "targets.float()",
    ),
    "MSE of integers": (lambda: f.mse_loss(CLASSES, CLASSES), "outputs are integers"),
    "BCE of no probabilities": (lambda: f.binary_cross_entropy(LOGITS[:, 0] + 1, FLOATS), "apply `sigmoid`"),
    "linear, float64": (lambda: LINEAR(INPUTS.double()), "inputs.float()"),
    "linear, int64": (lambda: LINEAR(INPUTS.long()), "inputs.float()"),
    "convolution, uint8": (lambda: CONVOLUTION(IMAGES.permute(0, 3, 1, 2).byte()), "inputs.float()"),
    "batch norm, float64": (lambda: nn.BatchNorm1d(4)(INPUTS.double()), "inputs.float()"),
    "LSTM, float64": (lambda: nn.LSTM(4, 3)(INPUTS.double()), "inputs.float()"),
    "embedding, float32": (lambda: nn.Embedding(5, 3)(INPUTS), "inputs.long()"),
    "embedding out of range": (lambda: nn.Embedding(5, 3)(torch.tensor([5])), "size of the vocabulary"),
    "linear, features": (lambda: nn.Linear(5, 3)(INPUTS), "in_features=5, and its input has 4"),
    "convolution, channels": (lambda: CONVOLUTION(IMAGES), "expects 3 channels in the second dimension, which is 8"),
    "batch norm of one sample": (lambda: nn.BatchNorm1d(4)(INPUTS[:1]), '{"drop_last": True}'),
    "cross-entropy of a tuple": (lambda: untyped(f.cross_entropy)((LOGITS,), CLASSES), "returns a tuple where"),
    "cross-entropy of a dict": (lambda: untyped(f.cross_entropy)({"logits": LOGITS}, CLASSES), "returns a dict where"),
    "MSE of a tuple": (lambda: untyped(f.mse_loss)((LOGITS,), FLOATS), "returns a tuple where"),
    "BCE of a dict": (lambda: untyped(f.binary_cross_entropy)({}, FLOATS), "returns a dict where"),
    "linear of a tuple": (lambda: LINEAR((INPUTS, INPUTS)), "A layer got a tuple"),
    "another device": (lambda: LINEAR(INPUTS.to("meta")), "tensors on different devices"),
    "a graph of an earlier step": (backward_twice, "state.detach()"),
}


def untyped(function: Any) -> Any:
    return function


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")  # before torch raises
@pytest.mark.parametrize("case", CASES)
def test_a_message_of_torch_has_a_hint(case: str) -> None:
    act, hint = CASES[case]
    with pytest.raises(Exception) as caught:  # noqa: PT011  # torch's classes differ
        act()
    assert hint in (find_hint(str(caught.value)) or "")


# Messages that need a GPU, or a lack of memory, to be provoked.
OTHER_MESSAGES = {
    "DataLoader worker (pid 12) is killed by signal: Killed. ": "--shm-size",
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly": "--shm-size",
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with": "Return tensors on the CPU",
    "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported": "CUDA_LAUNCH_BL",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!": "register_buffe",
    "Expected all tensors to be on the same device, but got mat1 is on cpu, different from othe": "register_buffe",
}


@pytest.mark.parametrize("message", OTHER_MESSAGES)
def test_a_message_that_is_not_provoked_has_a_hint(message: str) -> None:
    assert OTHER_MESSAGES[message] in (find_hint(message) or "")


def test_the_message_of_a_worker_has_the_hint_of_its_cause() -> None:
    message = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\nRuntimeError: "
    assert find_hint(message + "stack expects each tensor to be equal size, but got [1] at entry 0") is not None


def test_other_messages_have_no_hint() -> None:
    assert find_hint("on purpose") is None
