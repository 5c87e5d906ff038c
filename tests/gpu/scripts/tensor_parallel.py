"""Splits one layer of a model over one GPU, and prints the devices of its tensors: in the run, and after it."""

import json

import torch
import torch.distributed as dist
from torch import nn

from ptacc.engines.sharded import ShardedModel, make_mesh
from ptacc.engines.tensor_parallel import resolve_layers, split_layers

if __name__ == "__main__":
    dist.init_process_group("nccl")
    device = torch.device("cuda", 0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layers = resolve_layers(model, {"2": "colwise_gather_output"}, 1, "plan")
    mesh = make_mesh(device, {"tp": 1})
    sharded = ShardedModel(model, device, lambda _: split_layers(mesh, layers))
    during = sorted({tensor.device.type for tensor in model.state_dict().values()})
    outputs = model(torch.ones(3, 4, device=device))
    sharded.release()
    after = sorted({tensor.device.type for tensor in model.state_dict().values()})
    print(json.dumps({"during": during, "after": after, "outputs": list(outputs.shape)}))  # noqa: T201
    dist.destroy_process_group()
