"""Parameter groups of an optimizer by weight decay, and by the depth of their layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn import Parameter

from ptacc.errors import ModelError, OptionError
from ptacc.model.selection import ModuleSelector, check_selectors, select_submodules
from ptacc.validation import check_positive, did_you_mean, list_some

ParameterGroup: TypeAlias = dict[str, Any]  # torch's own type
"""A parameter group, as optimizers take it: its `"params"`, and its settings by name."""
OWNER = "decay_groups"
NORM = re.compile(r"Norm(\d+d)?$")
"""The class names of norm layers, such as `LayerNorm`, `LlamaRMSNorm` and `LayerNorm2d`."""


def decay_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    no_decay: Sequence[ModuleSelector] = (),
    layers: Sequence[ModuleSelector] | None = None,
    include_frozen: bool = True,
) -> list[ParameterGroup]:
    """Return parameter groups in which biases, norms and embeddings have no weight decay.

    A parameter has no weight decay if it has at most one dimension, if its own name contains the word "bias", as in
    `in_proj_bias`, or if it belongs to an `nn.Embedding`, an `nn.EmbeddingBag` or a norm: a module of a class, or of a
    subclass of one, whose name ends in "Norm". The same is true of the names that a method `no_weight_decay()` of the
    model returns, as models of timm have it. A tied parameter is in one group, and has no weight decay if one of its
    names has none.

    With `layer_decay`, each layer has the learning rate of the layer after it, times `layer_decay`. Parameters that the
    model registers before the layers, such as embeddings, come before the first layer. All others outside the layers,
    such as those of the head, come after the last one, and have the learning rate `lr`.

    Args:
        model: The model, not wrapped.
        lr: Learning rate of the parameters that are closest to the output.
        weight_decay: Weight decay of the other parameters, at least 0.
        layer_decay: Factor from a layer to the layer before it, above 0 and at most 1. None for one learning rate.
        no_decay: Further parameters without weight decay: their names, in which `*` stands for any characters, or
            classes of the modules that contain them.
        layers: The layers from the input to the output: their names, such as `"encoder.layer.*"`, or classes. Modules
            that one entry selects are in the order of the model. None for the blocks of the model's one `nn.ModuleList`
            or `nn.Sequential` of at least two modules of one class, which have submodules themselves. Lists within
            blocks do not count.
        include_frozen: Whether parameters that require no gradient are included. Optimizers of torch skip them until
            they are unfrozen.

    Returns:
        Groups with `"name"`, `"params"`, `"lr"` and `"weight_decay"`. Names are `"decay"` and `"no_decay"`; with
        `layer_decay`, `"layer_<n>_decay"` and `"layer_<n>_no_decay"`, where 0 comes before the first layer.

    Raises:
        OptionError: A number is not in its range, or `layers` was given without `layer_decay`.
        ModelError: A name or a class matches nothing, or the model has no layers, or several lists of them.

    Source: Bao et al., 2021, https://arxiv.org/abs/2106.08254, for the decay of learning rates by layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ptacc import decay_groups
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = decay_groups(model, lr=1e-3, weight_decay=0.05)
        >>> [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
        [('decay', 2, 0.05), ('no_decay', 4, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_arguments(lr, weight_decay, layer_decay, layers)
    undecayed = find_undecayed(model, no_decay)
    depths = {} if layer_decay is None else find_depths(model, layers)
    parts: dict[tuple[int, bool], list[Parameter]] = {}
    for parameter in model.parameters():
        if include_frozen or parameter.requires_grad:
            parts.setdefault((depths.get(parameter, 0), parameter in undecayed), []).append(parameter)
    deepest = max(depths.values(), default=0)
    return [
        {
            "name": ("" if layer_decay is None else f"layer_{depth}_") + ("no_decay" if is_undecayed else "decay"),
            "params": parameters,
            "lr": lr * (layer_decay or 1.0) ** (deepest - depth),
            "weight_decay": 0.0 if is_undecayed else weight_decay,
        }
        for (depth, is_undecayed), parameters in sorted(parts.items(), key=itemgetter(0))
    ]


def check_arguments(lr: object, weight_decay: object, layer_decay: object, layers: object) -> None:
    """Raise `OptionError` for a number out of its range, and for arguments that have no effect."""
    check_positive(OWNER, "lr", lr)
    if not (isinstance(weight_decay, int | float) and 0 <= weight_decay < math.inf):
        raise OptionError(f"{OWNER}(weight_decay={weight_decay!r}): must be a finite number of at least 0.")
    if layer_decay is None:
        if layers is not None:
            raise OptionError(f"{OWNER}(layers=[...]) has no effect without layer_decay, such as 0.8.")
    elif not (isinstance(layer_decay, int | float) and 0 < layer_decay <= 1):
        raise OptionError(f"{OWNER}(layer_decay={layer_decay!r}): must be above 0 and at most 1, such as 0.8.")


# ---- weight decay


def find_undecayed(model: nn.Module, no_decay: Sequence[ModuleSelector]) -> set[Parameter]:
    """Return the parameters without weight decay.

    Raises:
        ModelError: An entry of `no_decay` matches nothing.
    """
    check_selectors(OWNER, "no_decay", no_decay)
    names = [selector for selector in no_decay if isinstance(selector, str)]
    classes = [selector for selector in no_decay if not isinstance(selector, str)]
    owners = select_submodules(model, classes, f"{OWNER}(no_decay=[...])")
    found = {parameter for owner in owners for parameter in owner.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        found |= find_by_name(model, parameters, name)
    method = cast(Callable[[], Sequence[str]] | None, getattr(model, "no_weight_decay", None))
    listed = set(method()) if callable(method) else set[str]()
    found |= {parameter for name, parameter in parameters.items() if name in listed}
    for module in model.modules():
        is_norm = any(NORM.search(base.__name__) for base in type(module).__mro__)
        is_undecayed = is_norm or isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for name, parameter in module.named_parameters(recurse=False):
            if is_undecayed or parameter.ndim <= 1 or "bias" in name.split("_"):
                found.add(parameter)
    return found


def find_by_name(model: nn.Module, parameters: Mapping[str, Parameter], pattern: str) -> set[Parameter]:
    """Return the parameters whose names match a pattern.

    Raises:
        ModelError: None of them does.
    """
    matches = {parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)}
    if not matches:
        raise ModelError(
            f"{OWNER}(no_decay=[{pattern!r}]): {type(model).__name__} has no parameter of that name. "
            f"{did_you_mean(pattern, parameters)}There are: {list_some(list(parameters), most=10)}."
        )
    return matches


# ---- depth


def find_depths(model: nn.Module, layers: Sequence[ModuleSelector] | None) -> dict[Parameter, int]:
    """Return the depth of each parameter: 0 before the first layer, the layer's number in it, and one more after all.

    Raises:
        ModelError: The layers were not found.
    """
    if layers is None:
        blocks = find_blocks(model)
    else:
        check_selectors(OWNER, "layers", layers)
        option = f"{OWNER}(layers=[...])"
        blocks = [module for selector in layers for module in select_submodules(model, [selector], option)]
    number_of: dict[Parameter, int] = {}
    for number, block in enumerate(blocks, start=1):
        for parameter in block.parameters():
            number_of.setdefault(parameter, number)
    depths: dict[Parameter, int] = {}
    outside = 0
    for parameter in model.parameters():
        if parameter in number_of:
            outside = len(blocks) + 1
        depths[parameter] = number_of.get(parameter, outside)
    return depths


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the model's one list of them, in order.

    Raises:
        ModelError: The model has no such list, or several.
    """
    lists = {blocks: name for name, blocks in iterate_block_lists(model)}
    if len(lists) != 1:
        found = f"has lists of blocks at {', '.join(lists.values())}" if lists else "has no list of equal blocks"
        raise ModelError(
            f"{OWNER}(layer_decay=...): {type(model).__name__} {found}. Name the layers from the input to the output: "
            'layers=["encoder.layer.*"].'
        )
    return list(next(iter(lists)).children())


def iterate_block_lists(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost lists of blocks, with their names."""
    children = dict(module.named_children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
    if is_list and len({*map(type, children.values())}) == 1 and any(any(c.children()) for c in children.values()):
        yield name, module
        return
    for key, child in children.items():
        yield from iterate_block_lists(child, f"{name}.{key}" if name else key)
