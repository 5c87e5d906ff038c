"""scikit-learn's digits as the files of MNIST."""

import struct
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def write_mnist(folder: Path) -> None:
    """Write what torchvision's MNIST downloads into `folder`: 1,797 digits of 28 x 28 pixels, for training and test."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    large = np.kron(images.reshape(-1, 8, 8), np.ones((1, 3, 3))) * 255 / 16
    pixels = np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, len(pixels), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 2049, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())
