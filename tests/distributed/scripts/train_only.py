"""Trains on the tiny data and exits right after the last collective."""

from ptacc import Trainer
from ptacc.testing import tiny_data, tiny_parts

if __name__ == "__main__":
    Trainer(**tiny_parts()).train(tiny_data(24), tiny_data(13), num_epochs=2, per_device_batch_size=4)
