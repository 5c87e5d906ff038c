"""Train a small transformer of your own to write Python's documentation, one character after another."""

import math
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import GradClipMixin, LRSchedulerMixin, SeedMixin, Trainer, decay_groups
from ptacc.schedules import warmup_cosine

CHARACTERS = 128  # ASCII
LENGTH = 64
WIDTH = 64
HEADS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_heads = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH))
        self.from_heads = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        heads = self.to_heads(hidden).unflatten(-1, (3, HEADS, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (items, heads, length, width / heads) each
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.from_heads(attended.transpose(1, 2).flatten(2))
        outputs: Tensor = hidden + self.mlp(hidden)
        return outputs


class CharacterLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS))

    @override
    def forward(self, text: Tensor) -> Tensor:
        """Return logits of the next characters, `(items, CHARACTERS, length)`, for text `(items, length)`."""
        hidden = self.characters(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.blocks(hidden))
        return logits.transpose(1, 2)  # as nn.CrossEntropyLoss takes them


class TextTrainer(SeedMixin, GradClipMixin, LRSchedulerMixin, Trainer):
    pass


def load_text() -> Tensor:
    words = " ".join(topics[name] for name in sorted(topics)).split()
    return torch.tensor(list(" ".join(words).encode("ascii", "ignore")))


def cut(text: Tensor, stride: int) -> TensorDataset:
    """Return pieces of a text, each with the characters that follow: two tensors `(items, LENGTH)`."""
    pieces = text.unfold(0, LENGTH + 1, stride)
    return TensorDataset(pieces[:, :-1], pieces[:, 1:])


@torch.no_grad()
def write(model: CharacterLM, text: Tensor, length: int) -> str:
    for _ in range(length):
        logits = model(text[None, -LENGTH:])[0, :, -1]
        text = torch.cat([text, (logits / 0.7).softmax(dim=0).multinomial(1)])
    return bytes(text.tolist()).decode("ascii")


def main() -> None:
    torch.manual_seed(0)
    text = load_text()
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = CharacterLM()
    trainer = TextTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=AdamW(decay_groups(model, lr=1e-2, weight_decay=0.1)),
        create_scheduler=warmup_cosine(0.1),
        max_grad_norm=1.0,
        seed=0,
    )
    trainer.train(cut(train, stride=16), max_steps=1000, per_device_batch_size=16)
    loss = trainer.evaluate(cut(test, stride=LENGTH), per_device_batch_size=64).loss  # in nats
    trainer.print(write(model, test[:LENGTH].to(trainer.accelerator.device), length=200))
    trainer.print(f"bits per character: {loss / math.log(2):.2f}")


if __name__ == "__main__":
    main()
