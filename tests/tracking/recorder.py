"""A tracker that records its calls."""

from collections.abc import Mapping

from ptacc.protocols import ConfigValue, TrackedRun


class Recorder:
    """Records its calls, and raises an error in the method named `fails_in`."""

    name = "recorder"

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in = fails_in
        self.starts: list[TrackedRun | None] = []
        self.config: Mapping[str, ConfigValue] = {}
        self.points: list[tuple[int, Mapping[str, float]]] = []
        self.exit_codes: list[int] = []

    def start(self, config: Mapping[str, ConfigValue], resume: TrackedRun | None) -> str:
        self._fail("start")
        self.starts.append(resume)
        self.config = config
        return f"run {len(self.starts)}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._fail("log")
        self.points.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)
        self._fail("finish")

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.points]

    def _fail(self, method: str) -> None:
        if method == self.fails_in:
            raise ConnectionError("no network")
