"""Further cadences, next to `ptacc.Steps`, `ptacc.Epochs` and `ptacc.Minutes`."""

import ptacc.public
from ptacc.types.progress import Items

__all__ = ["Items"]

ptacc.public.set_public_module(__name__, __all__)
