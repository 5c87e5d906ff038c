"""Samplers, as values of `train_dataloader_kwargs={"sampler": ...}`."""

import ptacc.public
from ptacc.samplers.length_grouped import LengthGrouped

__all__ = ["LengthGrouped"]

ptacc.public.set_public_module(__name__, __all__)
