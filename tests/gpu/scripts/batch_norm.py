"""Prints the largest differences of a synchronized batch norm on one GPU to torch's batch norm."""

import copy
import json
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from ptacc.model.batch_norm import global_batch_norm

if __name__ == "__main__":
    device = Accelerator().device
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64).to(device)
    expected_norm = copy.deepcopy(norm)
    inputs = torch.randn(16, 64, 28, 28, device=device, requires_grad=True)
    expected_inputs = inputs.detach().clone().requires_grad_()
    outputs, expected = global_batch_norm(inputs, norm), expected_norm(expected_inputs)
    weights = torch.randn_like(expected)
    for each in (outputs, expected):
        (each * weights).sum().backward()
    pairs: dict[str, Any] = {
        "outputs": (outputs, expected),
        "gradients": (inputs.grad, expected_inputs.grad),
        "mean": (norm.running_mean, expected_norm.running_mean),
        "variance": (norm.running_var, expected_norm.running_var),
    }
    gaps = {name: (one - other).detach().abs().max().item() for name, (one, other) in pairs.items()}
    print(json.dumps(gaps))  # noqa: T201
    dist.destroy_process_group()
