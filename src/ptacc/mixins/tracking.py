"""Trackers, such as TensorBoard."""

import contextlib
from collections.abc import Generator, Mapping, Sequence

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.tracking.run_trackers import TRACKERS, check_trackers, finishing_trackers, log_image, make_run_trackers
from ptacc.tracking.tracker import Tracker


class TrackingMixin(Mixin):
    """Passes the configuration and the reported values of a run to trackers, on rank 0, by the number of steps.

    Options:
        trackers: Trackers of `ptacc.tracking` or your own, or names of packages, such as `"tensorboard"`.

    Hooks: `around_run`, `on_run_start`, `on_values`.

    Combines with: everything.
    """

    trackers: Sequence[Tracker | str] = ()
    log_image = log_image

    @override
    def check_options(self) -> None:
        self.trackers = check_trackers(type(self).__name__, self.trackers)

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        with super().around_run(), finishing_trackers(self.run):
            yield

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.run[TRACKERS] = make_run_trackers(self, self.trackers)

    @override
    def on_values(self, values: Mapping[str, float], step: int) -> None:
        super().on_values(values, step)
        self.run[TRACKERS].log(values, step)
