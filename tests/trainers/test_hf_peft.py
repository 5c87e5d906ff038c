"""Adapters of peft train, resume from checkpoints without the frozen weights, and are exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ptacc import CheckpointMixin, SeedMixin, Steps
from ptacc.trainers import CausalLMTrainer, SavePretrained, Seq2SeqTrainer
from tests.trainers.hf_models import collate, make_gpt2, make_language_data, make_optimizer, make_t5

peft = pytest.importorskip("peft")


class AdapterTrainer(SeedMixin, CheckpointMixin, CausalLMTrainer):
    """Saves the adapters alone, and resumes."""

    checkpoint_frozen: bool = False
    seed: int | None = 0


def make_adapted(task: str = "CAUSAL_LM", model: Any = None) -> Any:
    model = make_gpt2() if model is None else model
    fan_in = {"fan_in_fan_out": True} if task == "CAUSAL_LM" else {}
    targets = ["c_attn"] if task == "CAUSAL_LM" else ["q", "v"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type=task, **fan_in))


def train(directory: Path, steps: int, *callbacks: Any) -> AdapterTrainer:
    model = make_adapted()
    trainer = AdapterTrainer(
        model,
        optimizer=torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01),
        checkpoint_dir=directory,
        checkpoint_every=Steps(2),
        resume=True,
        callbacks=callbacks,
        default_callbacks=(),
    )
    data = make_language_data(16)
    trainer.train(data, data, collate_fn=collate, max_steps=steps, per_device_batch_size=4)
    return trainer


def weights(trainer: AdapterTrainer) -> dict[str, Tensor]:
    return trainer.unwrapped_model.state_dict()


def test_adapters_resume_from_checkpoints_without_frozen_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 8)
    train(tmp_path / "parts", 4)
    resumed = train(tmp_path / "parts", 8)
    assert resumed.history.steps[-1].loss == whole.history.steps[-1].loss
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_only_adapters_change_and_are_exported(tmp_path: Path) -> None:
    before = make_adapted().state_dict()
    trainer = train(tmp_path / "runs", 4)
    changed = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in trainer.unwrapped_model.named_parameters() if weight.requires_grad}
    trainer.export_model(tmp_path / "adapters.safetensors", trainable_only=True)
    assert load_file(tmp_path / "adapters.safetensors").keys() == changed


def test_peft_loads_the_best_adapters(tmp_path: Path) -> None:
    trainer = train(tmp_path / "runs", 8, SavePretrained(tmp_path / "best", "eval_loss"))
    assert (tmp_path / "best" / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (tmp_path / "best" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(make_gpt2(), tmp_path / "best")
    torch.testing.assert_close(loaded.state_dict(), weights(trainer), rtol=0, atol=0)


def test_a_model_with_adapters_generates() -> None:
    model = make_adapted("SEQ_2_SEQ_LM", make_t5())
    trainer = Seq2SeqTrainer(
        model, optimizer=make_optimizer(model), generation={"max_new_tokens": 4}, default_callbacks=()
    )
    data = make_language_data(6)
    trainer.train(data, data, collate_fn=collate, max_steps=2)
    assert all(0 < len(tokens) <= 4 for tokens in trainer.predict(data, collate_fn=collate))
