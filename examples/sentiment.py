"""Classify reviews as positive or negative with a small BERT. Negations and contrasts decide, not single words."""

import random

import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import WordLevelTrainer
from torch.optim import AdamW
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from ptacc import LRSchedulerMixin, SeedMixin
from ptacc.schedules import warmup_linear
from ptacc.trainers import SequenceClassificationTrainer

NOUNS = ["plot", "acting", "music", "dialogue", "ending", "cast", "camera", "pace", "humour", "script"]
NEGATIVE = ["bad", "dull", "awful", "clumsy", "boring", "weak", "shallow", "tired"]
POSITIVE = ["good", "great", "brilliant", "charming", "clever", "moving", "fresh", "strong"]
PLAIN = [
    "the {noun} was {adjective}",
    "the {noun} was nothing but {adjective}",
    "there was a {adjective} {noun}",
    "what a {adjective} {noun}",
    "I found the {noun} really {adjective}",
]
NEGATED = [
    "the {noun} was not {adjective}",
    "the {noun} was anything but {adjective}",
    "I never found the {noun} really {adjective}",
]
REVIEWS = ["{clause}", "{other}, but {clause}", "{clause}, although {other}", "although {other}, {clause}"]


def write_clause(is_positive: bool) -> str:
    template = random.choice(PLAIN + NEGATED)
    adjectives = POSITIVE if is_positive != (template in NEGATED) else NEGATIVE
    return template.format(noun=random.choice(NOUNS), adjective=random.choice(adjectives))


def write_review() -> tuple[str, int]:
    """Return a review and its label, which is 1 if the main clause is positive."""
    label, other_label = random.choices([0, 1], k=2)
    clause, other = write_clause(label == 1), write_clause(other_label == 1)
    return random.choice(REVIEWS).format(clause=clause, other=other), label


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.train_from_iterator(texts, WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    )


def make_model(vocabulary: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # the default is for wider layers
    )
    return BertForSequenceClassification(config)


class SentimentTrainer(SeedMixin, LRSchedulerMixin, SequenceClassificationTrainer[BertForSequenceClassification]):
    pass


def main() -> None:
    random.seed(0)
    torch.manual_seed(0)
    reviews = list({write_review(): None for _ in range(5000)})  # without duplicates
    test, train = reviews[:500], reviews[500:]
    (texts, labels), (test_texts, test_labels) = zip(*train, strict=True), zip(*test, strict=True)
    phrases = make_pipeline(CountVectorizer(ngram_range=(1, 3)), LogisticRegression(max_iter=1000)).fit(texts, labels)

    tokenizer = make_tokenizer([text for text, _ in train])
    train_data, test_data = ([{**tokenizer(text), "labels": label} for text, label in part] for part in (train, test))
    model = make_model(len(tokenizer))
    trainer = SentimentTrainer(
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3),
        create_scheduler=warmup_linear(0.1),
        metrics={"accuracy": MulticlassAccuracy(2, average="micro")},
        seed=0,
    )
    collate = DataCollatorWithPadding(tokenizer)
    trainer.train(train_data, collate_fn=collate, num_epochs=8, per_device_batch_size=32)
    metrics = trainer.evaluate(test_data, collate_fn=collate).metrics
    trainer.print(f"accuracy of a linear model of up to three words: {phrases.score(test_texts, test_labels):.3f}")
    trainer.print(f"accuracy: {metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
