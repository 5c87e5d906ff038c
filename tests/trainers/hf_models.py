"""Small models of transformers, without dropout, and ragged data for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

VOCABULARY = 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
Sample = dict[str, Tensor]
Collate = Callable[[list[Sample]], dict[str, Any]]


def make_gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    no_dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **options}
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        eos_token_id=1,
        bos_token_id=1,
        **no_dropout,
    )
    return GPT2LMHeadModel(config)


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=32, pad_token_id=0))


def make_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    options: dict[str, Any] = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **options))


def make_classifier(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    no_dropout: dict[str, Any] = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        **options,
    }
    return BertForSequenceClassification(BertConfig(**SIZES, **no_dropout))


def make_tagger() -> BertForTokenClassification:
    torch.manual_seed(0)
    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return BertForTokenClassification(BertConfig(**SIZES, **no_dropout))


def make_segmenter() -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4}
    no_dropout: dict[str, Any] = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0, "sr_ratios": [1] * 4}
    options: dict[str, Any] = {**sizes, **no_dropout, "decoder_hidden_size": 8, "num_labels": 3}
    model = SegformerForSemanticSegmentation(SegformerConfig(**options))
    model.decode_head.batch_norm = nn.Identity()  # type: ignore[assignment]  # its statistics are those of a batch
    return model


def make_listener(**options: Any) -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    names = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    convolutions = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "feat_extract_norm": "layer"}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    no_dropout = {**dict.fromkeys(names, 0.0), "layerdrop": 0.0, "mask_time_prob": 0.0}
    given: dict[str, Any] = {**SIZES, **convolutions, **positions, **no_dropout, **options}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**given))


def make_texts(count: int = 23, *, longest: int = 12) -> list[Sample]:
    """Return sequences of different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, VOCABULARY, (length,), generator=generator)} for length in lengths]


def make_language_data(count: int = 23) -> list[Sample]:
    """Return sequences whose first tokens are not to be predicted, as prompts."""
    samples = make_texts(count)
    for index, sample in enumerate(samples):
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][: index % 3] = -100
    return samples


def make_translation_data(count: int = 23) -> list[Sample]:
    return [
        {**sample, "labels": sample["input_ids"].flip(0)[: 2 + i % 7]} for i, sample in enumerate(make_texts(count))
    ]


def make_class_data(count: int = 23) -> list[Sample]:
    return [{**sample, "labels": sample["input_ids"].sum() % 3} for sample in make_texts(count)]


def make_tag_data(count: int = 23) -> list[Sample]:
    return [{**sample, "labels": sample["input_ids"] % 3} for sample in make_texts(count)]


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Pad sequences, with labels of -100."""
    ids = [sample["input_ids"] for sample in samples]
    labels = [sample["labels"] for sample in samples]
    is_ragged = labels[0].dim() > 0
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100) if is_ragged else torch.stack(labels),
    }


def make_optimizer(model: nn.Module, learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate)
