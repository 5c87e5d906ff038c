"""The exceptions of ptacc. Every one of them says what was given, what is needed and what to do.

```
PtaccError
├── CompositionError (TypeError)      a class statement that cannot be right
├── OptionError (ValueError)          an option or argument with a value that cannot be right
│   ├── DataError                     data that is missing, empty or not what it says
│   ├── ModelError                    a model or optimizer that cannot be trained as given
│   ├── SchedulerError                a schedule on another optimizer, or shorter than the run
│   └── MonitorError                  a monitored value that nobody reports
├── LossError (ValueError)            a step returned something that cannot be minimised
├── NoRunError (RuntimeError)         the state of a run was asked for before there was a run
├── NestedRunError (RuntimeError)     a `train()` within a `train()`
├── RankFailedError (RuntimeError)    another process of the launch failed, or was killed
├── CollectiveError (RuntimeError)    a call that is for all processes was made on some of them
├── CheckpointError                   a checkpoint that cannot be written or read
│   ├── DamagedCheckpointError        files that are not what was written
│   └── MissingPartError              a part that a run needs and a checkpoint does not have
└── LaunchError (RuntimeError)        the launch and the trainer disagree
    └── AcceleratorConflictError      two trainers of one process want different accelerators
```
"""


class PtaccError(Exception):
    """The root of every exception that ptacc raises on purpose."""


class CompositionError(PtaccError, TypeError):
    """A class statement that cannot be right: found when the class is made, before anything runs."""


class OptionError(PtaccError, ValueError):
    """An option or an argument with a value that cannot be right."""


class DataError(OptionError):
    """Data that is missing, empty, or not what it says it is."""


class ModelError(OptionError):
    """A model or an optimizer that cannot be trained as given."""


class SchedulerError(OptionError):
    """A schedule that drives another optimizer, or that ends before the run does."""


class MonitorError(OptionError):
    """A monitored value that neither the trainer nor its mixins report."""


class LossError(PtaccError, ValueError):
    """A training step returned something that cannot be minimised."""


class NoRunError(PtaccError, RuntimeError):
    """The state of a run was asked for before there was a run."""


class NestedRunError(PtaccError, RuntimeError):
    """`train()` was called within a `train()` of the same trainer."""


class RankFailedError(PtaccError, RuntimeError):
    """Another process of the launch failed, or was killed; the message says which, where and why."""


class CollectiveError(PtaccError, RuntimeError):
    """A call that all processes make together was made on some of them only; the message says where."""


class CheckpointError(PtaccError):
    """A checkpoint that cannot be written, or not be read."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


class MissingPartError(CheckpointError):
    """A checkpoint does not have a part that the run needs."""


class LaunchError(PtaccError, RuntimeError):
    """The way the script was launched and the trainer disagree."""


class AcceleratorConflictError(LaunchError):
    """Two trainers of one process ask for accelerators that cannot both exist."""
