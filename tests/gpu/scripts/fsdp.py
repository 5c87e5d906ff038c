"""Shards a model over one GPU, takes steps with clipped gradients, and prints the losses and the tensors afterwards."""

import json

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.optim import SGD

from ptacc.engines.base import OptimizerSlot
from ptacc.engines.fsdp import shard_units
from ptacc.engines.sharded import ShardedEngine, make_mesh
from tests.gpu.parts import BATCH, MAX_NORM, make_data, make_net

if __name__ == "__main__":
    accelerator = Accelerator()
    model, (inputs, targets) = make_net(), make_data()[:BATCH]
    slots = [OptimizerSlot("optimizer", SGD(model.parameters(), lr=0.1))]
    mesh = make_mesh(accelerator.device, {"dp_shard": 1})
    engine = ShardedEngine(
        accelerator,
        model,
        slots,
        lambda module: shard_units(
            module,
            mesh,
            [*model.children()],
            reshard_after_forward=True,
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            cpu_offload=False,
        ),
    )
    losses = []
    for _ in range(3):
        with engine.around_batch(is_last=True):
            outputs = engine.model(inputs.to(accelerator.device)).float()
            loss = torch.nn.functional.cross_entropy(outputs, targets.to(accelerator.device))
            engine.backward(loss)
        engine.unscale_gradients()
        engine.clip_norm(MAX_NORM)
        engine.update()
        losses.append(loss.item())
    engine.release()
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    print(json.dumps({"losses": losses, "is_sharded": is_sharded}))  # noqa: T201
    dist.destroy_process_group()
