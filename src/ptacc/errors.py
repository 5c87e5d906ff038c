"""The exceptions that ptacc raises. Each message says what was given, what is needed and what to do.

```
PtaccError
├── CompositionError (TypeError)      an invalid class definition
├── OptionError (ValueError)          an option or argument with an invalid value
│   ├── DataError                     data that is missing, empty or inconsistent
│   ├── ModelError                    a model or optimizer that cannot be trained
│   ├── SchedulerError                a schedule for another optimizer, or shorter than the run
│   └── MonitorError                  a monitored value that is not reported
├── LossError (ValueError)            a step returned an invalid loss or output
├── NoRunError (RuntimeError)         the state of a run was read before the first run
├── NestedRunError (RuntimeError)     `train()` was called within a run
├── RankFailedError (RuntimeError)    another rank failed or was killed
├── CollectiveError (RuntimeError)    a call for all ranks was made on some of them only
├── CheckpointError                   a checkpoint that cannot be written or read
│   ├── DamagedCheckpointError        a file that is missing or was changed
│   └── MissingPartError              a checkpoint without a part that the run needs
└── LaunchError (RuntimeError)        the launch and the trainer disagree
    └── AcceleratorConflictError      two trainers of one process need different accelerators
```
"""


class PtaccError(Exception):
    """Base class of the exceptions that ptacc raises."""


class CompositionError(PtaccError, TypeError):
    """A class definition is invalid. Raised when the class is defined, before anything runs."""


class OptionError(PtaccError, ValueError):
    """An option or argument has an invalid value."""


class DataError(OptionError):
    """Data is missing, empty, or does not have the length or the form that it claims."""


class ModelError(OptionError):
    """A model or an optimizer cannot be trained."""


class SchedulerError(OptionError):
    """A schedule is for another optimizer, or ends before the run does."""


class MonitorError(OptionError):
    """A monitored value is reported neither by the trainer nor by its mixins."""


class LossError(PtaccError, ValueError):
    """A training or evaluation step returned an invalid loss or output."""


class NoRunError(PtaccError, RuntimeError):
    """The state of a run was read before the first call of `train()`."""


class NestedRunError(PtaccError, RuntimeError):
    """`train()` was called within a run, an evaluation or a prediction of the same trainer."""


class RankFailedError(PtaccError, RuntimeError):
    """Another rank failed or was killed. The message names the rank, the place and the cause."""


class CollectiveError(PtaccError, RuntimeError):
    """A call that every rank must make was made on some of them only. The message says where."""


class CheckpointError(PtaccError):
    """A checkpoint cannot be written or read."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, or its content was changed."""


class MissingPartError(CheckpointError):
    """A checkpoint does not have a part that the run needs."""


class LaunchError(PtaccError, RuntimeError):
    """The launch and the options of the trainer disagree."""


class AcceleratorConflictError(LaunchError):
    """Two trainers of one process need accelerators with different settings."""
