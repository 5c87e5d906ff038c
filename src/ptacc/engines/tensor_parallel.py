"""Tensor parallelism: the matrices of single layers are split over processes, by torch itself.

```
colwise                 rows of the weight matrix: each process computes some of the layer's outputs
rowwise                 its columns: each takes some inputs, as a colwise layer left them, and the parts are summed
colwise_gather_output   as colwise, and every process has all outputs
embedding_rowwise       rows of an embedding's table: each process looks up its own tokens, and the parts are summed
```

These are the names that transformers gives them in the plans of its models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

from torch import nn

from ptacc.errors import ModelError
from ptacc.model.selection import describe_no_match, is_match
from ptacc.types.protocols import ParallelStyleLike

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

SplitName: TypeAlias = Literal["colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"]
SPLITS = frozenset(get_args(SplitName))
Layers: TypeAlias = Mapping[str, tuple[nn.Module, SplitName | ParallelStyleLike]]


def resolve_layers(
    model: nn.Module, plan: Mapping[str, SplitName | ParallelStyleLike], size: int, option: str
) -> Layers:
    """Return the layers that a plan means, by name, each with how it is split.

    Args:
        model: Where they are.
        plan: Names of submodules, in which `*` stands for anything, each with a way to split.
        size: Number of processes to split over.
        option: What errors call the plan.

    Raises:
        ModelError: A name that no submodule has, or a layer that cannot be split so.
    """
    submodules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    layers: dict[str, tuple[nn.Module, SplitName | ParallelStyleLike]] = {}
    for choice, split in plan.items():
        found = {name: module for name, module in submodules.items() if is_match(choice, name, module)}
        if not found:
            raise ModelError(f"{option}: {describe_no_match(choice, model, submodules)}")
        for name, module in found.items():
            if isinstance(split, str):
                check_can_be_split(module, split, size, f"{option}: {name}")
            layers[name] = (module, split)
    check_not_shared(submodules, layers, option)
    return layers


def check_can_be_split(module: nn.Module, split: str, size: int, layer: str) -> None:
    """Raise `ModelError` for a layer of another kind, or of a size that processes cannot share evenly."""
    kind = nn.Embedding if split == "embedding_rowwise" else nn.Linear
    if not isinstance(module, kind):
        raise ModelError(
            f"{layer} is a {type(module).__name__}, and {split!r} splits a {kind.__name__}. Leave it out, or give a "
            "ParallelStyle of torch that fits it."
        )
    rows, columns = module.weight.shape
    length = columns if split == "rowwise" else rows
    if length % size:
        raise ModelError(
            f"{layer} has {length} {'inputs' if split == 'rowwise' else 'rows'}, which {size} processes cannot share "
            f"evenly. Leave it out, or split over a divisor of {length}."
        )


def check_not_shared(submodules: Mapping[str, nn.Module], layers: Layers, option: str) -> None:
    """Raise `ModelError` where a layer shares a parameter with another module: split, it would be one of its own."""
    holders: dict[int, set[int]] = {}
    for module in submodules.values():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    for name, (module, _) in layers.items():
        if any(len(holders[id(parameter)]) > 1 for parameter in module.parameters(recurse=False)):
            raise ModelError(
                f"{option}: {name} shares a parameter with another module, as tied embeddings do, and split it would "
                "be trained for itself. Leave it out of the plan, or untie the two."
            )


def split_layers(mesh: DeviceMesh, layers: Layers) -> None:
    """Split layers over a mesh of one dimension, in place. A collective."""
    from torch.distributed.tensor.parallel import parallelize_module

    for module, split in layers.values():
        parallelize_module(
            module, mesh, make_parallel_style(split) if isinstance(split, str) else cast("ParallelStyle", split)
        )


def make_parallel_style(split: SplitName) -> ParallelStyle:
    """Return torch's own form of a way to split."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if split == "rowwise":
        return RowwiseParallel()
    if split == "embedding_rowwise":
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel(output_layouts=Replicate()) if split == "colwise_gather_output" else ColwiseParallel()
