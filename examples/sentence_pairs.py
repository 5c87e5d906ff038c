"""Train a small BERT to say whether two sentences have the same meaning. Each word has one that means the same."""

import random
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from ptacc import LRSchedulerMixin, RunPlan, SeedMixin
from ptacc.trainers import SequenceClassificationTrainer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ADJECTIVES = ["big large", "small little", "quick fast", "happy glad", "old ancient"]
NOUNS = ["stone rock", "child kid", "cat kitten", "boat ship", "house home"]
VERBS = ["starts begins", "ends stops", "speaks talks", "weeps cries", "jumps leaps"]


class PairTrainer(SeedMixin, LRSchedulerMixin, SequenceClassificationTrainer[BertForSequenceClassification]):
    pass


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *" ".join(ADJECTIVES + NOUNS + VERBS).split()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def make_pairs(tokenizer: PreTrainedTokenizerFast, num_pairs: int) -> list[dict[str, Any]]:
    """Return token ids, types and attention masks of pairs, with the label 1 if their meanings are the same."""
    pairs = []
    for number in range(num_pairs):
        meaning, other = zip(*(random.sample(words, 2) for words in (ADJECTIVES, NOUNS, VERBS)), strict=True)
        is_same = number % 2 == 0
        first, second = (
            " ".join(random.choice(words.split()) for words in words_of)
            for words_of in (meaning, meaning if is_same else other)
        )
        pairs.append({**tokenizer(first, second), "labels": int(is_same)})
    return pairs


def linear(optimizer: Optimizer, plan: RunPlan) -> LambdaLR:
    scheduler: LambdaLR = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, plan.total_steps // 10, plan.total_steps
    )
    return scheduler


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    train, test = make_pairs(tokenizer, 2000), make_pairs(tokenizer, 300)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertForSequenceClassification(config)
    trainer = PairTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=2e-3),
        create_scheduler=linear,
        metrics={"accuracy": MulticlassAccuracy(2)},
        seed=0,
    )
    collate = DataCollatorWithPadding(tokenizer)
    history = trainer.train(train, test, collate_fn=collate, num_epochs=8, per_device_batch_size=32)
    trainer.print(f"accuracy: {history[-1].metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
