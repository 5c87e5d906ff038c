"""Images for trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptacc.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ImageLike: TypeAlias = "Tensor | NDArray[np.generic] | Figure"


def to_image(name: str, image: ImageLike) -> NDArray[np.uint8]:
    """Convert an image or a figure, see `log_image`, to an array `(height, width, 3)` of bytes."""
    if not isinstance(image, Tensor | np.ndarray):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas: Any = FigureCanvasAgg(image)  # its methods have no types
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
    array = torch.as_tensor(image).detach().cpu()
    array = array[..., None] if array.ndim == 2 else array
    if (
        array.ndim != 3
        or array.shape[-1] not in (1, 3)
        or not (array.is_floating_point() or array.dtype == torch.uint8)
    ):
        raise OptionError(
            f"log_image({name!r}): got shape {tuple(image.shape)} of {image.dtype}, and needs (height, width) or "
            "(height, width, 3), of uint8, or of floats from 0 to 1. For (3, height, width), pass "
            "image.permute(1, 2, 0)."
        )
    if array.is_floating_point():
        array = (array.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return array.expand(*array.shape[:2], 3).numpy()
