import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import AMPMixin, StepOutput, Trainer
from ptacc.protocols import Precision
from tests.ranks import run_ranks


class Mixed(AMPMixin, Trainer):
    """Records the dtype in which each layer computes."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        layer = self.unwrapped_model.get_submodule("0")
        handle = layer.register_forward_hook(lambda module, inputs, output: recorded.append(output.dtype))
        try:
            return super().train_step(batch)
        finally:
            handle.remove()


recorded: list[torch.dtype] = []


def train(precision: Precision | None) -> set[torch.dtype]:
    recorded.clear()
    model = nn.Sequential(nn.Linear(4, 2))
    data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Mixed(
        model, loss_func=nn.CrossEntropyLoss(), optimizer=optimizer, mixed_precision=precision, default_callbacks=()
    )
    trainer.train(data, num_epochs=1)
    return set(recorded)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32), (None, torch.float32)]
)
def test_layers_compute_in_the_requested_precision(precision: Precision | None, dtype: torch.dtype) -> None:
    assert train(precision) == {dtype}


def test_the_precision_of_the_launch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_ranks(train, 1, None) == [{torch.bfloat16}]
