"""A table of a model's layers: shared parameters are counted once, and repeated blocks are shown once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn
from torch.nn import Parameter

from ptacc.display.tables import Rows
from ptacc.tensors.structures import has_shape
from ptacc.validation import list_some

MOST_ROWS = 40
"""The largest number of rows. Deeper layers are left out if the table would be longer."""


@dataclass(frozen=True)
class Layer:
    """A module with parameters, and its submodules with parameters. Two are equal if only their names differ.

    Args:
        name: Its name, as in `named_modules()`.
        kind: The name of its class.
        shapes: Its own parameters by name, each with its shape, and with its first name if it is shared.
        parameters: Number of its parameters, submodules included, without those of earlier layers.
        trainable: How many of them require a gradient.
        is_known: Whether the shapes of all its parameters are known. Those of lazy layers are unknown at first.
        parts: The submodules by their names in it.
    """

    name: str = field(compare=False)
    kind: str
    shapes: tuple[str, ...]
    parameters: int
    trainable: int
    is_known: bool
    parts: Mapping[str, Layer]

    def rows(self, depth: int) -> Rows:
        """Return a row for this layer, and rows for those within it, down to a depth."""
        inside = f"{len(self.leaves())} layers" if self.parts and not depth and not self.shapes else ""
        rows = [self._row(self.name or "(model)", inside or list_some(self.shapes))]
        for first, *others in [list(alike) for _, alike in groupby(self.parts.values() if depth else ())]:
            shown = first.rows(depth - 1)
            rows += shown
            if len(others) * len(shown) > 1:
                rows.append(others[0]._row_of_all(others, first))  # noqa: SLF001  # another layer's
            else:
                rows += [row for other in others for row in other.rows(depth - 1)]
        return tuple(rows)

    def depth(self) -> int:
        """Return how many levels of layers there are within this one."""
        return max((1 + part.depth() for part in self.parts.values()), default=0)

    def leaves(self) -> list[Layer]:
        """Return the layers within this one that have no layers within them; the layer itself if it has none."""
        return [leaf for part in self.parts.values() for leaf in part.leaves()] or [self]

    def _row(self, name: str, shapes: str, times: int = 1) -> tuple[str, ...]:
        if not self.is_known:
            return name, self.kind, shapes, "unknown", ""
        if not self.parameters:
            return name, self.kind, shapes, "shared" if self.shapes or self.parts else "0", ""
        some = "yes" if self.trainable == self.parameters else f"{self.trainable * times:,}"
        return name, self.kind, shapes, f"{self.parameters * times:,}", some if self.trainable else "no"

    def _row_of_all(self, alike: list[Layer], first: Layer) -> tuple[str, ...]:
        last = f" … {alike[-1].name.rpartition('.')[2]}" if len(alike) > 1 else ""
        return self._row(f"{self.name}{last}", f"{len(alike)} more like {first.name}", len(alike))


def read_layers(module: nn.Module, name: str, seen: dict[Parameter, str]) -> Layer:
    """Return a module as a layer. `seen` has the names of the parameters of earlier layers; its own are added."""
    prefix, shapes, new = f"{name}." if name else "", list[str](), list[Parameter]()
    for own_name, parameter in module.named_parameters(recurse=False):
        full_name = prefix + own_name
        first = seen.setdefault(parameter, full_name)
        text = str(tuple(parameter.shape)).replace(",)", ")") if has_shape(parameter) else "(?)"
        shapes.append(f"{own_name} {text}" + (f" = {first}" if first != full_name else ""))
        new += [parameter] if first == full_name else []
    children = {child: read_layers(part, prefix + child, seen) for child, part in module.named_children()}
    parts = {child: layer for child, layer in children.items() if layer.shapes or layer.parts}
    sizes = [(parameter.numel() if has_shape(parameter) else 0, parameter.requires_grad) for parameter in new]
    return Layer(
        name=name,
        kind=type(module).__name__,
        shapes=tuple(shapes),
        parameters=sum(size for size, _ in sizes) + sum(part.parameters for part in parts.values()),
        trainable=sum(size for size, is_trainable in sizes if is_trainable) + sum(p.trainable for p in parts.values()),
        is_known=all(map(has_shape, new)) and all(part.is_known for part in parts.values()),
        parts=parts,
    )


def layer_rows(modules: Mapping[str, nn.Module]) -> Rows:
    """Return rows of name, class, shapes of the parameters, number of parameters, and whether they are trainable.

    The name of the model is empty.

    Example:
        >>> layer_rows({"": nn.Linear(3, 2)})
        (('(model)', 'Linear', 'weight (2, 3), bias (2)', '8', 'yes'),)
    """
    seen: dict[Parameter, str] = {}
    layers = [read_layers(module, name, seen) for name, module in modules.items()]
    rows: Rows = ()
    for depth in range(max(1, *(layer.depth() for layer in layers)), 0, -1):
        rows = tuple(row for layer in layers for row in layer.rows(depth))
        if len(rows) <= MOST_ROWS:
            return rows
    return (*rows[: MOST_ROWS - 1], (f"… {len(rows) - MOST_ROWS + 1} more", "", "", "", ""))
