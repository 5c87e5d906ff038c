"""Tensor parallelism: the weight matrices of single layers are sharded over ranks, by torch's `parallelize_module`.

```
colwise                 rows of the weight are sharded: each rank computes some of the layer's outputs
rowwise                 columns of the weight are sharded: each rank takes the inputs that a colwise layer left on it,
                        and the partial outputs are summed
colwise_gather_output   as colwise, then every rank gathers all outputs
embedding_rowwise       rows of an embedding's table are sharded: each rank looks up its tokens, and results are summed
```

The names are those of the plans of transformers' models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

from torch import nn

from ptacc.errors import ModelError
from ptacc.model.selection import find_matches
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
    """Return the layers of a plan by name, each with how it is split over a number of ranks.

    In the names of the plan, `*` stands for any characters. `option` is the plan's name for errors.

    Raises:
        ModelError: No submodule has a name of the plan, or a layer cannot be split in that way.
    """
    submodules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    layers: dict[str, tuple[nn.Module, SplitName | ParallelStyleLike]] = {}
    for pattern, split in plan.items():
        for name, module in find_matches(pattern, model, submodules, option).items():
            if isinstance(split, str):
                check_can_be_split(module, split, size, f"{option}: {name}")
            layers[name] = (module, split)
    check_not_shared(submodules, layers, option)
    return layers


def check_can_be_split(module: nn.Module, split: str, size: int, layer: str) -> None:
    """Raise `ModelError` if a layer is of another class, or the ranks cannot share its weight evenly."""
    kind = nn.Embedding if split == "embedding_rowwise" else nn.Linear
    if not isinstance(module, kind):
        raise ModelError(
            f"{layer} is a {type(module).__name__}, and {split!r} splits a {kind.__name__}. Leave it out, or give a "
            "ParallelStyle of torch for it."
        )
    rows, columns = module.weight.shape
    length = columns if split == "rowwise" else rows
    if length % size:
        raise ModelError(
            f"{layer} has {length} {'inputs' if split == 'rowwise' else 'rows'}, which {size} processes cannot share "
            f"evenly. Leave it out, or split over a divisor of {length}."
        )


def check_not_shared(submodules: Mapping[str, nn.Module], layers: Layers, option: str) -> None:
    """Raise `ModelError` if a layer shares a parameter with another module: a split one would no longer be shared."""
    holders: dict[int, set[int]] = {}
    for module in submodules.values():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    for name, (module, _) in layers.items():
        if any(len(holders[id(parameter)]) > 1 for parameter in module.parameters(recurse=False)):
            raise ModelError(
                f"{option}: {name} shares a parameter with another module, as tied embeddings do. Split, they would be "
                "trained separately. Leave it out of the plan, or untie the two."
            )


def split_layers(mesh: DeviceMesh, layers: Layers) -> None:
    """Split layers over a mesh of one dimension, in place. A collective."""
    from torch.distributed.tensor.parallel import parallelize_module

    for module, split in layers.values():
        parallelize_module(
            module, mesh, make_parallel_style(split) if isinstance(split, str) else cast("ParallelStyle", split)
        )


def make_parallel_style(split: SplitName) -> ParallelStyle:
    """Return the `ParallelStyle` of torch for a way to split."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if split == "rowwise":
        return RowwiseParallel()
    if split == "embedding_rowwise":
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel(output_layouts=Replicate()) if split == "colwise_gather_output" else ColwiseParallel()
