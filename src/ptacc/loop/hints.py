"""Hints for errors of torch that are frequent in training: what the message means here, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

SHAPES = (
    "The outputs of the model and the targets have different shapes. If one is (n, 1) and the other (n,), use "
    "`targets.unsqueeze(1)` in the dataset, or `outputs.squeeze(1)` in the model."
)
CLASSES = (
    "Class losses need targets that are class indices, of dtype int64 and shape (n,): use `targets.long()` in the "
    "dataset, and `targets.squeeze(1)` if they have the shape (n, 1)."
)
FLOATS = "This loss needs targets of the dtype of the outputs: use `targets.float()` in the dataset."
INPUTS = (
    "The inputs have another dtype than the model's parameters. NumPy arrays are float64, and images often uint8: use "
    "`inputs.float()` in the dataset."
)
CLASS_RANGE = (
    "A class index is not in the range from 0 to the number of the model's outputs minus 1. Count classes from 0, and "
    "compare `targets.max()` of the whole dataset with the size of the last layer. ignore_index is for targets that do "
    "not count."
)
OUTPUTS = (
    "The model returns a {0} where a tensor is needed. Return the tensor from `forward`, or derive from Trainer and "
    "override train_step and eval_step, where you select it: `self.model(inputs).logits`, or `self.model(inputs)[0]`."
)
RAGGED = (
    "The samples of a batch differ in shape. Pad them in a collate_fn, such as one with "
    "`torch.nn.utils.rnn.pad_sequence`, or bring them to one shape in the dataset."
)
DEVICES = (
    "An operation got tensors on different devices. Batches and the model are moved to the device of the run. Other "
    "tensors are not: make them buffers (`register_buffer`), or create them with `device=inputs.device`."
)
# Messages of torch 2.13 for the CPU and CUDA, and of earlier versions where they differ.
HINTS: Mapping[str, str] = {
    r"stack expects each tensor to be equal size|each element in list of batch should be of equal size": RAGGED,
    r"default_collate: batch must contain tensors.*found (?:<class '(?:\w+\.)*)?(\w+)": (
        "torch's collate function cannot make a batch of values of type {0}. Return tensors or numbers from the "
        "dataset, or give a collate_fn."
    ),
    r"Target size .* must be the same as input size|Using a target size": SHAPES,
    r"The size of tensor a .* must match the size of tensor b": (
        "Two tensors have shapes that do not fit. In a loss these are the outputs and the targets: compare the shapes "
        "of the batch above with what the model returns."
    ),
    r"[Ee]xpected target dtype to be Long|expected scalar type Long but found|multi-target not supported": CLASSES,
    r"Expected floating point type for target with class probabilities": (
        "Targets of the shape of the outputs are class probabilities, and have to be floats. For class indices, use "
        "`targets.argmax(dim=1)`; for one-hot targets, `targets.float()`."
    ),
    r"Expected input batch_size \((\d+)\) to match target batch_size \((\d+)\)": (
        "The model returns {0} rows for {1} targets. Look for a `view` or `reshape` in the model that changes the "
        "first dimension."
    ),
    r"Found dtype (?:Long|Double|Int|Bool) but expected Float": FLOATS,
    r"result type Float can't be cast to the desired output type (?:Long|Int|Bool|Byte)": FLOATS,
    r'"mse_\w+" not implemented for': "The outputs are integers, which have no gradients: return floats.",
    r"all elements of target should be between 0 and 1|all elements of input should be between 0 and 1": (
        "nn.BCELoss needs probabilities: apply `sigmoid` in the model, or use nn.BCEWithLogitsLoss, which is more "
        "exact. Targets have to be from 0 to 1 too."
    ),
    r"must have the same dtype, but got|Input type \([\w. ]+\) and (?:bias|weight) type|mixed dtype \(CPU\)": INPUTS,
    r"RNN input dtype \([\w.]+\) does not match weight dtype|expected scalar type Float but found": INPUTS,
    r"Expected tensor for argument #1 'indices' to have .* scalar types: Long": (
        "An embedding needs integers: use `inputs.long()` in the dataset."
    ),
    r"Target -?\d+ is out of bounds": CLASS_RANGE,
    r"index out of range in self": (
        "An index is not below the size of an embedding: compare `inputs.max()` of the whole dataset with "
        "num_embeddings, which is the size of the vocabulary."
    ),
    r"device-side assert triggered": (
        "A kernel found an invalid value, most often a class index or an index of an embedding out of its range. The "
        "error may belong to an earlier operation: run on the CPU, or with CUDA_LAUNCH_BLOCKING=1, to see which. This "
        "process cannot use the GPU any more: start it again."
    ),
    r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x\d+\)": (
        "A linear layer has in_features={2}, and its input has {1} features. Change the layer, or flatten the inputs "
        "from the second dimension on (`nn.Flatten()`)."
    ),
    r"Given groups=\d+, weight of size .* to have (\d+) channels, but got (\d+) channels": (
        "A convolution expects {0} channels in the second dimension, which is {1}. Images of shape (n, height, width, "
        "channels) need `inputs.permute(0, 3, 1, 2)`."
    ),
    r"Expected more than 1 value per channel when training": (
        "Batch normalization cannot train on a batch of one sample. Leave the last, smaller batch out: "
        '`train_dataloader_kwargs={{"drop_last": True}}`.'
    ),
    r"Batch size should be even when using this": (
        "Mixup of timm needs batches of an even size. Leave the last, smaller batch out: "
        '`train_dataloader_kwargs={{"drop_last": True}}`. MixUpMixin takes batches of any size.'
    ),
    r"(?:loss|entropy\w*|kl_div)\(\): argument 'input' \(position 1\) must be Tensor, not (\w+)": OUTPUTS,
    r"argument 'input' \(position 1\) must be Tensor, not list": (
        "A layer got a list in place of a tensor. The samples hold lists, as rows of `datasets` do: use "
        '`dataset.with_format("torch")`, or make tensors in the dataset or in a collate_fn.'
    ),
    r"argument 'input' \(position 1\) must be Tensor, not (\w+)": (
        "A layer got a {0} in place of a tensor: in `forward`, select the tensor that the layer takes. nn.Sequential "
        "passes on what the layer before returned."
    ),
    r"'(tuple|list|dict|\w*Output\w*)' object has no attribute 'size'": OUTPUTS,
    r"Expected all tensors to be on the same device|is not on the expected device": DEVICES,
    r"DataLoader worker .* (?:is killed by signal|exited unexpectedly)": (
        "A worker process died, most often because memory ran out: of the host, or shared memory, which containers "
        "limit (`docker run --shm-size`). Use fewer workers or smaller batches."
    ),
    r"Cannot re-initialize CUDA in forked subprocess": (
        "The dataset uses the GPU in a worker process. Return tensors on the CPU: batches are moved to the device."
    ),
    r"Trying to backward through the graph a second time": (
        "The loss depends on the graph of an earlier step. Detach what is kept from one step to the next, such as a "
        "hidden state: `state.detach()`."
    ),
}
"""Patterns of messages, each with its hint, which may refer to the groups of the pattern."""


def find_hint(message: str) -> str | None:
    """Return the hint for a message, None if there is none.

    Example:
        >>> find_hint("mat1 and mat2 shapes cannot be multiplied (8x16 and 10x4)")[:64]
        'A linear layer has in_features=10, and its input has 16 features'
    """
    found = ((re.search(pattern, message, re.DOTALL), hint) for pattern, hint in HINTS.items())
    return next((hint.format(*match.groups()) for match, hint in found if match), None)
