"""Train a small byte-level GPT-2 on the text of Python's own documentation.

The engine is an option: a replica on every process (DDP), or one model sharded over the processes by torch (FSDP2) or
DeepSpeed (ZeRO 3). All engines give the same results up to rounding, checkpoints to resume from, and weights that
transformers can load.

    python examples/gpt.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/gpt.py --engine fsdp --per-device-batch-size 8
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/gpt.py --engine deepspeed --per-device-batch-size 8
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel
from typing_extensions import override

from ptacc import (
    CheckpointMixin,
    DeepSpeedMixin,
    FSDPMixin,
    GradAccumMixin,
    GradClipMixin,
    LRSchedulerMixin,
    RunPlan,
    SeedMixin,
    StepOutput,
    TrainingLoop,
)
from ptacc.protocols import ZeroStage

LENGTH = 96
"""The maximum number of bytes in a sample."""
END = 0
"""The start and padding token: a byte that does not occur in the text."""
IGNORED = -100


@dataclass(frozen=True)
class TokenBatch:
    """Samples of different lengths, padded to the longest.

    Args:
        tokens: The input of the model, (samples, length).
        targets: The next token at each position, (samples, length); `IGNORED` in the padding.
    """

    tokens: Tensor
    targets: Tensor


def collate(samples: list[bytes]) -> TokenBatch:
    length = max(map(len, samples))
    tokens = torch.full((len(samples), length), END)
    targets = torch.full((len(samples), length), IGNORED)
    for row, sample in enumerate(samples):
        values = torch.tensor(list(sample))
        tokens[row, 1 : len(sample)] = values[:-1]
        targets[row, : len(sample)] = values
    return TokenBatch(tokens, targets)


def load_text() -> tuple[list[bytes], list[bytes]]:
    """Return paragraphs for training and evaluation, cut to `LENGTH` bytes."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [" ".join(part.split()).encode("ascii", "ignore") for part in text.split("\n\n")]
    samples = [part[start : start + LENGTH] for part in paragraphs for start in range(0, len(part), LENGTH)]
    samples = [sample for sample in samples if len(sample) > 8]
    return samples[: len(samples) * 9 // 10], samples[len(samples) * 9 // 10 :]


class GPTTrainer(
    SeedMixin, LRSchedulerMixin, GradAccumMixin, GradClipMixin, CheckpointMixin, TrainingLoop[TokenBatch, Tensor]
):
    """A loop whose loss is a mean over tokens, for any split into batches and processes.

    Options:
        stop_at: Stop the run early, after this step.
    """

    stop_at: int | None = None

    @override
    def should_stop(self) -> str | None:
        is_reached = self.stop_at is not None and self.progress.steps >= self.stop_at
        return super().should_stop() or (f"stop_at={self.stop_at}" if is_reached else None)

    @override
    def count_items(self, batch: TokenBatch) -> int:
        return int((batch.targets != IGNORED).sum())

    @override
    def train_step(self, batch: TokenBatch) -> StepOutput[Tensor]:
        logits: Tensor = self.model(batch.tokens).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return StepOutput.from_sum(loss, outputs=logits)


class ShardedGPTTrainer(FSDPMixin, GPTTrainer): ...


class ZeroGPTTrainer(DeepSpeedMixin, GPTTrainer):
    zero_stage: ZeroStage | None = 3


ENGINES: dict[str, type[GPTTrainer]] = {"torch": GPTTrainer, "fsdp": ShardedGPTTrainer, "deepspeed": ZeroGPTTrainer}


def make_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
    )
    return GPT2LMHeadModel(config)


def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=3e-3, total_steps=plan.total_steps)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="torch", help="how the model is distributed")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--stop-at", type=int, help="stop at this step; a later call resumes the run")
    parser.add_argument("--per-device-batch-size", type=int, default=16, help="batch size of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpt"), help="checkpoint directory; resumes a run in it")
    parser.add_argument("--prompt", default="The ", help="start of the generated text")
    return parser.parse_args(arguments)


def train(args: argparse.Namespace) -> GPTTrainer:
    torch.manual_seed(0)
    model = make_model()
    samples, held_out = load_text()
    trainer = ENGINES[args.engine](
        model,
        optimizer=AdamW(model.parameters(), lr=3e-3, weight_decay=0.01),
        create_scheduler=one_cycle,
        seed=0,
        checkpoint_dir=args.runs / args.engine,
        resume=True,
        keep_last=2,
        stop_at=args.stop_at,
        gradient_accumulation_steps=args.accumulate,
        max_grad_norm=1.0,
    )
    trainer.train(
        samples,
        held_out[:200],
        collate_fn=collate,
        max_steps=args.steps,
        per_device_batch_size=args.per_device_batch_size,
    )
    return trainer


def generate(weights: Path, prompt: str) -> str:
    """Continue a prompt with exported weights, using transformers without ptacc."""
    model = make_model()
    model.load_state_dict(load_file(weights))
    model.train(mode=False)
    tokens = [END, *prompt.encode()]
    with torch.no_grad():
        while len(tokens) < LENGTH:
            logits: Tensor = model(torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
    return bytes(tokens[1:]).decode("ascii", "replace")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    trainer = train(args)
    last = trainer.history[-1]
    trainer.print(f"step {last.step}: {last.train_loss:.4f} per byte in training, {last.eval_loss:.4f} in evaluation")
    weights = args.runs / f"{args.engine}.safetensors"
    trainer.export_model(weights, overwrite=True)
    if trainer.distributed.is_main:
        print(generate(weights, args.prompt))


if __name__ == "__main__":
    main()
