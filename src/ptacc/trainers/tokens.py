"""Trainers of models of transformers that predict tokens: for each token its class, or the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Generic

from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from ptacc.trainers.hf import IGNORED, HFTrainer, select_items
from ptacc.types.aliases import ModelT
from ptacc.types.outputs import EvalResult, StepOutput
from ptacc.types.protocols import MetricLike


class TokenClassificationTrainer(HFTrainer[ModelT], Generic[ModelT]):
    """Trains a model that classifies the tokens of sequences, or fills in masked tokens.

    Losses and metrics are exact means over the labels that are not -100, for any split into batches and processes. A
    batch may have none. Metrics get the logits `(labels, classes)` and the labels `(labels,)` of all that are not -100.
    A prediction is the logits `(length, classes)` of one sequence without its padding.

    Example:
        >>> from transformers import BertForMaskedLM, DataCollatorForLanguageModeling
        >>> class MaskedLMTrainer(TokenClassificationTrainer[BertForMaskedLM]): ...
    """

    @override
    def _compute_output(self, batch: Mapping[str, Any], label_smoothing: float) -> StepOutput[Tensor]:
        items = select_items(self.unwrapped_model, self.get_targets(batch)).sum()
        # A mean over no labels is NaN. With other labels it is finite, and the factor 0 removes it and its gradients.
        labels = batch["labels"].masked_fill(items == 0, 0)
        output = super()._compute_output({**batch, "labels": labels}, label_smoothing)
        return StepOutput.from_sum(output.loss * items, outputs=output.outputs)

    @override
    def predict_step(self, batch: Mapping[str, Any]) -> Any:
        """Compute the logits of each sequence, as a list of tensors `(length, classes)`."""
        return split_sequences(super().predict_step(batch), batch)

    @override
    def update_metrics(
        self, batch: Mapping[str, Any], output: StepOutput[Tensor], metrics: Iterable[MetricLike]
    ) -> None:
        """Update metrics with `(logits, targets)` of all targets that are not -100. A default hook."""
        targets = self.get_targets(batch)
        is_used = targets != IGNORED
        for metric in metrics:
            metric.update(output.outputs[is_used], targets[is_used])


class CausalLMTrainer(TokenClassificationTrainer[ModelT], Generic[ModelT]):
    """Trains a model that predicts the next token of a sequence.

    `labels` are aligned with `input_ids`, as collators of transformers make them; the model shifts them. The first
    label of a sequence is not predicted, and not counted. Losses are exact means over the predicted labels, for any
    split into batches and processes. Evaluations report `perplexity`, the exponential of the loss; it can be monitored.

    Sequences may be packed into one row, as `DataCollatorWithFlattening` does, with a model that supports it.

    Example:
        >>> from transformers import GPT2LMHeadModel
        >>> class Storyteller(CausalLMTrainer[GPT2LMHeadModel]): ...
    """

    @override
    def get_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the next token at each place, -100 at the last. A default hook: `labels`, shifted."""
        labels = super().get_targets(batch)
        shifted: Tensor | None = batch.get("shift_labels")
        return pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted is None else shifted

    @override
    def eval_value_names(self) -> frozenset[str]:
        return super().eval_value_names() | {"perplexity"}

    @override
    def _make_result(self, name: str, means: dict[str, float]) -> EvalResult:
        result = super()._make_result(name, means)
        return replace(result, metrics={**result.metrics, "perplexity": compute_perplexity(result.loss)})


def compute_perplexity(loss: float) -> float:
    """Return the exponential of a mean loss, infinity if it is too large for a float.

    Example:
        >>> compute_perplexity(0.0), compute_perplexity(1e6)
        (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def split_sequences(rows: Tensor, batch: Mapping[str, Any]) -> list[Tensor]:
    """Return what belongs to each sequence of a batch, without padding.

    Args:
        rows: `(rows, length, ...)`, something for each token.
        batch: The batch. Its `attention_mask` `(rows, length)` is 0 in the padding. Without one, a sequence starts
            where `position_ids` are 0, as in packed rows. With neither, each row is a sequence.
    """
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor) and mask.shape == rows.shape[:2]:
        return [row[is_token] for row, is_token in zip(rows, mask.bool(), strict=True)]
    if isinstance(positions, Tensor) and positions.shape == rows.shape[:2]:
        starts = (positions.flatten() == 0).nonzero().flatten().tolist()
        return list(rows.flatten(0, 1).tensor_split(starts[1:]))
    return list(rows)
