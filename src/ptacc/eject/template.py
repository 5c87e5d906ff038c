"""The script, with places for what mixins add: `# <<place>>` in a line of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import indent

MAKE_PARTS = '''\
def make_model() -> nn.Module:
    """Return the model{model}."""
    raise NotImplementedError("write make_model")


def make_optimizer(model: nn.Module) -> Optimizer:
    """Return the optimizer{optimizer}."""
    {make_optimizer}


def make_datasets() -> tuple[Dataset, Dataset]:
    """Return the data to train on, and the data to evaluate on."""
    raise NotImplementedError("write make_datasets")
'''

LOSS_FUNC = '''\
def loss_func(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch{loss}."""
    raise NotImplementedError("write loss_func")
'''

BATCH = """\
for batch in train_loader:
    loss, outputs = train_step(model, batch)
    accelerator.backward(loss)
    # <<batch_end>>
    # <<gradients_ready>>
    optimizer.step()
    optimizer.zero_grad()
    # <<step_end>>
"""
RECORD = """\
losses.append(loss.detach())
counts.append(count_items(batch))
"""

WINDOW = """\
# GradAccumMixin: the loss of a step is the mean over the items of its batches.
for window in make_windows(train_loader, GRADIENT_ACCUMULATION_STEPS):
    items = [count_items(batch) for batch in window]
    step_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(window):
        # Processes average their gradients in the last batch only.
        is_last = number == len(window) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss, outputs = train_step(model, batch)
            loss = loss / (sum(items) / items[number])
            accelerator.backward(loss)
        step_loss += loss.detach()
        # <<batch_end>>
    # <<gradients_ready>>
    optimizer.step()
    optimizer.zero_grad()
    # <<step_end>>
"""
RECORD_WINDOW = """\
losses.append(step_loss)
counts.append(sum(items))
"""

FUNCTIONS = '''\
def mean_loss(losses: list[Tensor], counts: list[int]) -> float:
    """Return the mean over the items of all processes from means of `counts` items."""
    values = torch.stack(losses).tolist()
    total = sum(loss * n for loss, n in zip(values, counts, strict=True))
    parts = gather_object([(total, sum(counts))])
    return sum(total for total, _ in parts) / sum(count for _, count in parts)


@torch.no_grad()
# <<signature>>
    """Return the values of an evaluation, in which every sample counts once."""
    model.eval()
    losses, counts = [], []
    for batch in loader:
        loss, outputs = eval_step(model, batch)
        losses.append(loss)
        counts.append(count_items(batch))
        # <<eval_batch>>
    values = {"eval_loss": mean_loss(losses, counts)}
    # <<eval_end>>
    return values


def train(
    model: nn.Module,
    optimizer: Optimizer,
    train_loader: DataLoader,
    eval_loader: DataLoader,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the model. Return the model to use, and the values of each epoch."""
    # <<accelerator>>
    # <<start>>

    train_loader = accelerator.prepare(train_loader)
    # Accelerate would repeat samples to give all processes equal numbers of batches.
    eval_loader = prepare_data_loader(
        eval_loader, accelerator.device, put_on_device=True, even_batches=False
    )
    # <<plan>>

    original = model  # without the wrappers of Accelerate
    model, optimizer = accelerator.prepare(model, optimizer)
    # <<prepared>>

    history = []
    for epoch in range(1, NUM_EPOCHS + 1):
        model.train()
        # <<epoch_start>>
        losses, counts = [], []
        # <<batches>>

        values = {"train_loss": mean_loss(losses, counts)}
        # <<values>>
        # <<evaluation>>
        # <<evaluation_end>>
        # <<epoch_end>>
        history.append(values)
        line = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
        accelerator.print(f"epoch {epoch}  {line}")
        # <<stop>>

    # <<end>>
    # <<returned>>


def main() -> None:
    torch.manual_seed(SEED)
    model = make_model()
    optimizer = make_optimizer(model)
    train_data, eval_data = make_datasets()
    # The loaders have generators of their own: loading data draws no random number
    # from the generator that dropout uses.
    train_loader = DataLoader(
        train_data,
        BATCH_SIZE,
        shuffle=True,
        generator=torch.Generator().manual_seed(SEED),
    )
    eval_loader = DataLoader(eval_data, BATCH_SIZE, generator=torch.Generator())
    model, _ = train(model, optimizer, train_loader, eval_loader)
    save(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
'''

PLACE = re.compile(r"^(?P<indent> *)# <<(?P<name>\w+)>>\n", re.MULTILINE)


def fill(template: str, texts: Mapping[str, str]) -> str:
    r"""Replace each place by its text, indented alike. A place without a text is left out.

    Example:
        >>> fill("def f():\n    # <<body>>\n    # <<more>>\n", {"body": "a = 1\nreturn a"})
        'def f():\n    a = 1\n    return a\n'
    """

    def replacement(place: re.Match[str]) -> str:
        text = texts.get(place["name"], "").strip("\n")
        return f"{indent(text, place['indent'])}\n" if text else ""

    return PLACE.sub(replacement, template)
