"""`SavePretrained` writes the best model as `from_pretrained` loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from ptacc import EMAMixin, FSDPMixin, RestoreBestWeights, Trainer
from ptacc.errors import OptionError
from ptacc.trainers import CausalLMTrainer, SavePretrained
from tests.ranks import run_ranks
from tests.trainers.hf_models import collate, make_gpt2, make_language_data, make_optimizer


class FakeTokenizer:
    def save_pretrained(self, save_directory: str, /) -> None:
        Path(save_directory, "tokenizer.json").write_text("{}")


class ShardedTrainer(FSDPMixin, CausalLMTrainer): ...


class AveragingTrainer(EMAMixin, CausalLMTrainer):
    ema_decay: float = 0.5


def train(
    directory: Path, trainer_class: type[CausalLMTrainer] = CausalLMTrainer, *, learning_rate: float = 0.01
) -> tuple[CausalLMTrainer, RestoreBestWeights]:
    model, best = make_gpt2(), RestoreBestWeights("eval_loss", restore=False)
    saving = SavePretrained(directory, "eval_loss", processor=FakeTokenizer())
    optimizer = make_optimizer(model, learning_rate)
    trainer = trainer_class(model, optimizer=optimizer, callbacks=[saving, best], default_callbacks=())
    data = make_language_data()
    options: Any = {"num_epochs": 4, "per_device_batch_size": 4, "train_dataloader_kwargs": {"shuffle": False}}
    trainer.train(data[:16], data[16:], collate_fn=collate, **options)
    assert (saving.best_value, saving.best_step) == (best.best_value, best.best_step)
    return trainer, best


def train_on_rank(directory: Path, trainer_class: type[CausalLMTrainer]) -> None:
    train(directory, trainer_class)


def load(directory: Path) -> dict[str, Tensor]:
    return GPT2LMHeadModel.from_pretrained(directory).state_dict()


@pytest.mark.parametrize("trainer_class", [CausalLMTrainer, AveragingTrainer])
def test_from_pretrained_loads_the_best_weights(trainer_class: type[CausalLMTrainer], tmp_path: Path) -> None:
    trainer, best = train(tmp_path / "best", trainer_class, learning_rate=0.2)
    torch.testing.assert_close(load(tmp_path / "best"), best.best_weights, rtol=0, atol=0)
    assert best.best_step < trainer.progress.steps
    assert (tmp_path / "best" / "tokenizer.json").exists()


def test_the_cache_is_on_in_the_configuration_that_is_written(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
    assert trainer.unwrapped_model.get_submodule("transformer").config.use_cache is True  # type: ignore[union-attr]


@pytest.mark.timeout(120)
def test_sharded_weights_are_gathered(tmp_path: Path) -> None:
    run_ranks(train_on_rank, 2, tmp_path / "sharded", ShardedTrainer)
    run_ranks(train_on_rank, 2, tmp_path / "copies", CausalLMTrainer)
    torch.testing.assert_close(load(tmp_path / "sharded"), load(tmp_path / "copies"))


def test_a_model_of_another_library_is_an_error(tmp_path: Path) -> None:
    model: Any = nn.Linear(2, 1)
    trainer = Trainer(
        model,
        loss_func=nn.MSELoss(),
        optimizer=make_optimizer(model),
        callbacks=[SavePretrained(tmp_path, "train_loss")],
    )
    with pytest.raises(OptionError, match="a Linear does not have the method save_pretrained"):
        trainer.train([(torch.zeros(2), torch.zeros(1))], num_epochs=1)
