"""Searches for a learning rate and a batch size, which restore all state, and pruning of Optuna's trials."""

import ptacc.public
from ptacc.tuning.batch_size import BatchSizeSearch, find_batch_size
from ptacc.tuning.learning_rate import LearningRateSearch, find_learning_rate
from ptacc.tuning.prune_trial import PruneTrial

__all__ = ["BatchSizeSearch", "LearningRateSearch", "PruneTrial", "find_batch_size", "find_learning_rate"]

ptacc.public.set_public_module(__name__, __all__)
