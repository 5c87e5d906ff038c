"""Trains the network of these tests in a launch with one process, and prints its losses and the backend."""

import json

import torch.distributed as dist

from tests.gpu.parts import train

if __name__ == "__main__":
    losses = [step.loss for step in train("bf16").history.steps]
    print(json.dumps({"backend": dist.get_backend(), "losses": losses}))  # noqa: T201
    dist.destroy_process_group()
