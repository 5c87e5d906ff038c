"""Searches for a learning rate and a batch size: they train for a few steps, then restore all state."""

import ptacc.public
from ptacc.tuning.batch_size import BatchSizeSearch, find_batch_size
from ptacc.tuning.learning_rate import LearningRateSearch, find_learning_rate

__all__ = ["BatchSizeSearch", "LearningRateSearch", "find_batch_size", "find_learning_rate"]

ptacc.public.set_public_module(__name__, __all__)
