"""Write the best model as `from_pretrained` of transformers loads it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from ptacc.checkpoint.export import exported_weights, states_to_export
from ptacc.core.hooks import TrainerCore
from ptacc.core.monitoring import BestValue
from ptacc.errors import OptionError
from ptacc.model.caching import caches_restored
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor


class Processor(Protocol):
    """A tokenizer, image processor, feature extractor or processor of transformers."""

    def save_pretrained(self, save_directory: str, /) -> object:
        """Write it to a directory."""
        ...


class SavePretrained(BestValue[TrainerCore]):
    """Writes the model to a directory whenever a monitored value is the best so far.

    `from_pretrained(directory)` of transformers loads it. Of a model with adapters of peft, the adapters are written,
    for `from_pretrained` of peft. The weights are those that were evaluated: with `EMAMixin`, the averages. Sharded
    weights are gathered. Rank 0 writes, and overwrites what it wrote for an earlier value.

    Args:
        directory: A local directory. It is created if it does not exist.
        monitor: The name of the value, or a `Monitor`.
        mode: Whether a lower or a higher value is better; a `Monitor` has its own mode.
        processor: The tokenizer or processor, to be written to the same directory.

    Attributes:
        best_value: The best value so far, NaN before the first.
        best_epoch: The epoch that reported it, counted from 1; 0 before the first step.
        best_step: The number of steps at that time.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        monitor: str | Monitor,
        *,
        mode: Mode = "min",
        processor: Processor | None = None,
    ) -> None:
        super().__init__(monitor, mode)
        self._directory = Path(directory)
        self._processor = processor

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        super().on_run_start(trainer)
        if not callable(getattr(trainer.unwrapped_model, "save_pretrained", None)):
            raise OptionError(
                f"SavePretrained({str(self._directory)!r}): a {type(trainer.unwrapped_model).__name__} does not have "
                "the method save_pretrained of transformers. Use SaveBest, or RestoreBestWeights and export_model()."
            )

    @override
    def _act(self, trainer: TrainerCore) -> None:
        with trainer.around_evaluation_weights():
            states = states_to_export(trainer, {})  # a collective
            if not trainer.distributed.is_main:
                return
            model: Any = trainer.unwrapped_model
            with caches_restored():
                model.save_pretrained(str(self._directory), state_dict=exported_weights(states))
        if self._processor is not None:
            self._processor.save_pretrained(str(self._directory))
