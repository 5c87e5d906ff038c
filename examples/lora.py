"""Adapt a small Llama to Python code with LoRA of peft, after it was trained on prose. Only the adapters are saved."""

import argparse
import inspect
import math
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from ptacc import GradClipMixin, LRSchedulerMixin, SeedMixin
from ptacc.protocols import SchedulerFactory
from ptacc.schedules import warmup_cosine
from ptacc.trainers import CausalLMTrainer, SavePretrained

LENGTH = 64


class TextTrainer(SeedMixin, GradClipMixin, LRSchedulerMixin, CausalLMTrainer[LlamaForCausalLM | PeftModel]):
    create_scheduler: SchedulerFactory = warmup_cosine(0.1)
    max_grad_norm: float | None = 1.0
    seed: int | None = 0


def make_trainer(model: LlamaForCausalLM | PeftModel, *callbacks: SavePretrained) -> TextTrainer:
    return TextTrainer(model, optimizer=AdamW(model.parameters(), lr=1e-2), callbacks=callbacks)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,  # ASCII
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,  # the default is for wider layers
    )
    return LlamaForCausalLM(config)


def cut(text: str) -> list[dict[str, Tensor]]:
    """Return pieces of a text. Its tokens are characters, and the model shifts the labels."""
    pieces = torch.tensor(list(text.encode("ascii", "ignore"))).unfold(0, LENGTH, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    prose, code = cut("\n".join(topics.values())), cut(inspect.getsource(inspect))
    test = cut(inspect.getsource(argparse))[:500]

    base = make_model()
    training = make_trainer(base)
    training.train(prose, max_steps=400, per_device_batch_size=16)
    bits_before = training.evaluate(test).loss / math.log(2)
    base.save_pretrained(folder / "base")

    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapting = make_trainer(adapted, SavePretrained(folder / "adapters", "perplexity"))
    adapting.train(code[100:], code[:100], max_steps=200, per_device_batch_size=16)
    trained, total = adapted.get_nb_trainable_parameters()
    adapting.print(f"{trained:,} of {total:,} parameters are trained")

    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapters")
    bits = make_trainer(loaded).evaluate(test).loss / math.log(2)
    adapting.print(f"bits per character without adapters: {bits_before:.2f}")
    adapting.print(f"bits per character: {bits:.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
