"""A trainer of models of transformers that write one sequence for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.errors import OptionError
from ptacc.trainers.hf import IGNORED
from ptacc.trainers.tokens import TokenClassificationTrainer
from ptacc.types.aliases import ModelT
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike

DECODER_KEYS = frozenset({"labels", "decoder_input_ids", "decoder_attention_mask"})
"""Entries of a batch that are what has to be written."""


class Seq2SeqTrainer(TokenClassificationTrainer[ModelT], Generic[ModelT]):
    """Trains a model that writes a sequence for another, such as a translation or a transcript.

    The loss is an exact mean over the labels that are not -100, for any split into batches and processes. Evaluations
    compute it too, and generate sequences if `generation` is given. Predictions are always generated: one tensor of
    tokens for each sample, without the start token and the padding.

    Options:
        generation: Keywords of `model.generate`, such as `{"max_new_tokens": 64, "num_beams": 4}`. If given,
            evaluations generate, and metrics get two lists, of the written and of the wanted sequences. If not, they
            get logits and labels as in `TokenClassificationTrainer`.
        decode: Turns sequences of tokens into texts, for the metrics: `partial(tokenizer.batch_decode,
            skip_special_tokens=True)`. Without it, sequences are tensors of tokens.

    Hooks: `generate_tokens`.

    Example:
        >>> from transformers import T5ForConditionalGeneration
        >>> class Translator(Seq2SeqTrainer[T5ForConditionalGeneration]): ...
    """

    generation: Mapping[str, Any] | None = None
    decode: Callable[[list[list[int]]], list[str]] | None = None

    @override
    def check_options(self) -> None:
        model: Any = self.model
        if not callable(getattr(model, "generate", None)):
            raise OptionError(
                f"{type(self).__name__}(model={type(model).__name__}(...)): the model must have a method `generate`, "
                "as models of transformers for conditional generation."
            )

    @hook("default")
    def generate_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Return generated sequences `(samples, length)`, padded. A default hook: `model.generate`."""
        model: Any = self.unwrapped_model
        inputs = {name: value for name, value in batch.items() if name not in DECODER_KEYS}
        tokens: Tensor = model.generate(**inputs, **(self.generation or {}))
        return tokens

    @override
    def eval_step(self, batch: Mapping[str, Any]) -> StepOutput[Tensor]:
        output = super().eval_step(batch)
        return output if self.generation is None else replace(output, outputs=self.generate_tokens(batch))

    @override
    def predict_step(self, batch: Mapping[str, Any]) -> Any:
        """Generate a sequence for each sample, as a list of tensors `(length,)`."""
        return self._without_padding(self.generate_tokens(batch))

    @override
    def update_metrics(
        self, batch: Mapping[str, Any], output: StepOutput[Tensor], metrics: Iterable[MetricLike]
    ) -> None:
        """Update metrics with `(written, wanted)`; without generation, with logits and labels. A default hook."""
        if output.outputs.is_floating_point():
            super().update_metrics(batch, output, metrics)
            return
        written = self._without_padding(output.outputs)
        wanted = [row[row != IGNORED] for row in self.get_targets(batch)]
        sequences: list[list[Any]] = [written, wanted]
        if self.decode is not None:
            sequences = [self.decode([row.tolist() for row in rows]) for rows in sequences]
        for metric in metrics:
            metric.update(*sequences)

    def _without_padding(self, tokens: Tensor) -> list[Tensor]:
        """Return generated rows without their first token, with which the decoder starts, and without padding."""
        config = getattr(self.unwrapped_model, "generation_config", None)
        padding = getattr(config, "pad_token_id", None)
        rows = tokens[:, 1:]
        return [row if padding is None else row[row != padding] for row in torch.unbind(rows)]
