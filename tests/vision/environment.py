"""timm and torchvision for tests: `python tests/vision/environment.py SCRIPT [ARGUMENT ...]` runs a script.

The Makefile installs them into a folder of their own. The operators of torchvision's wheel are in a library for CUDA.
With another build of torch the wheel has none, and its import fails, since it describes two of them for the compiler.
These are declared here, and `nms` is computed by torch.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, library

FOLDER = Path(sys.prefix) / "vision"
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def enable_vision() -> None:
    """Let this process import timm and torchvision. Call it before torchmetrics or transformers is imported."""
    sys.path.append(str(FOLDER))
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", SCHEMA)
        library.impl("torchvision::nms", "CPU")(suppress_overlaps)
        import torchvision.extension

        torchvision.extension._has_ops = lambda: True  # noqa: SLF001


def suppress_overlaps(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the indices of the boxes `(items, 4)` that overlap no box with a higher score, by descending score."""
    from torchvision.ops import box_iou

    kept: list[Tensor] = []
    for index in scores.argsort(descending=True):
        if not kept or bool((box_iou(boxes[index][None], boxes[torch.stack(kept)]) <= iou_threshold).all()):
            kept.append(index)
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)


if __name__ == "__main__":
    enable_vision()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
