"""The table of layers is short, and counts each parameter once."""

import torch
from torch import nn
from typing_extensions import override

from ptacc.model.summary import MOST_ROWS, layer_rows


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)


class Tied(nn.Module):
    """A language model whose last layer has the weights of the first."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(10, 4), nn.Dropout()
        self.blocks = nn.ModuleList(Block(4) for _ in range(depth))
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    @override
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_repeated_blocks_are_shown_once_and_shared_parameters_are_counted_once() -> None:
    assert layer_rows({"": Tied(12)}) == (
        ("(model)", "Tied", "", "376", "yes"),
        ("embed", "Embedding", "weight (10, 4)", "40", "yes"),
        ("blocks", "ModuleList", "", "336", "yes"),
        ("blocks.0", "Block", "", "28", "yes"),
        ("blocks.0.norm", "LayerNorm", "weight (4), bias (4)", "8", "yes"),
        ("blocks.0.linear", "Linear", "weight (4, 4), bias (4)", "20", "yes"),
        ("blocks.1 … 11", "Block", "11 more like blocks.0", "308", "yes"),
        ("head", "Linear", "weight (10, 4) = embed.weight", "shared", ""),
    )


def test_a_frozen_block_is_not_like_the_others() -> None:
    model = Tied(4)
    model.blocks[0].requires_grad_(False)
    model.blocks[3].norm.requires_grad_(False)
    rows = {name: (shapes, trainable) for name, _, shapes, _, trainable in layer_rows({"": model})}
    assert rows["(model)"] == ("", "116")
    assert rows["blocks.0"] == ("", "no")
    assert rows["blocks.2"] == ("1 more like blocks.1", "yes")
    assert rows["blocks.3"] == ("", "20")


def test_deep_layers_are_left_out_of_a_long_table() -> None:
    parts = [nn.Sequential(nn.Linear(width, 4), nn.Linear(4, width)) for width in range(1, MOST_ROWS)]
    rows = layer_rows({"": nn.Sequential(*parts)})
    assert len(rows) == MOST_ROWS
    assert rows[1] == ("0", "Sequential", "2 layers", "13", "yes")


def test_a_wide_model_is_cut_off() -> None:
    rows = layer_rows({"": nn.Sequential(*(nn.Linear(width, 1) for width in range(1, 100)))})
    assert len(rows) == MOST_ROWS
    assert rows[-1][0] == "… 61 more"


def test_shapes_of_lazy_layers_are_unknown_at_first() -> None:
    rows = layer_rows({"": nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))})
    assert rows[1] == ("0", "LazyLinear", "weight (?), bias (?)", "unknown", "")
    assert rows[0][3] == "unknown"


def test_modules_outside_of_the_model_are_listed_by_their_place() -> None:
    model = nn.Linear(2, 2)
    rows = layer_rows({"": model, "options.loss_func": nn.ModuleList([nn.Linear(2, 1, bias=False), model])})
    assert [row[0] for row in rows] == ["(model)", "options.loss_func", "options.loss_func.0", "options.loss_func.1"]
    assert rows[-1][2] == "weight (2, 2) = weight, bias (2) = bias"


def test_a_model_without_parameters_has_one_row() -> None:
    assert layer_rows({"": nn.ReLU()}) == (("(model)", "ReLU", "", "0", ""),)
