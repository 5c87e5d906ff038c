"""Parameter groups by weight decay and by depth: every parameter once, in the group that users expect."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import LRSchedulerMixin, Trainer, decay_groups
from ptacc.errors import ModelError, OptionError

transformers = pytest.importorskip("transformers")
SMALL: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
Make = Callable[[], nn.Module]


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_hidden_layers=3))


def gpt2() -> Any:  # ties its head to its embedding
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_hidden_layers=2))


def t5() -> Any:
    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


every_model = pytest.mark.parametrize("make", [bert, gpt2, llama, t5])


def group_names(model: nn.Module, **options: Any) -> dict[str, set[str]]:
    """Return the names of the parameters of each group. A tied one has the first of its names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = decay_groups(model, lr=1.0, weight_decay=0.1, **options)
    return {group["name"]: {names[parameter] for parameter in group["params"]} for group in groups}


def rates(model: nn.Module, **options: Any) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in decay_groups(model, lr=1.0, weight_decay=0.1, **options)}


# ---- weight decay


@every_model
def test_every_parameter_is_in_one_group(make: Make) -> None:
    model = make()
    parameters = [p for group in decay_groups(model, lr=1.0, weight_decay=0.1) for p in group["params"]]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) == set(model.parameters())


@every_model
def test_what_decays_in_the_trainer_of_transformers_decays_apart_from_embeddings(make: Make) -> None:
    model = make()
    trainer = transformers.Trainer.get_decay_parameter_names
    named = dict(model.named_parameters(remove_duplicate=False))
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    expected = {named[name] for name in trainer(None, model)} - embeddings
    decay, _ = decay_groups(model, lr=1.0, weight_decay=0.1)
    assert set(decay["params"]) == expected


class Scale(nn.LayerNorm):
    """A subclass of a norm, of another name."""


class ChannelNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = Parameter(torch.ones(3, 1, 1))


class Odd(nn.Module):
    """Has parameters that neither their shape nor the end of their name tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.expert_bias = Parameter(torch.ones(())), Parameter(torch.ones(2, 3))
        self.bias_layer = nn.Linear(3, 3)
        self.scale, self.channels = Scale([3, 4]), ChannelNorm2d()
        self.bag, self.position = nn.EmbeddingBag(5, 3), Parameter(torch.ones(1, 4, 3))
        self.head = nn.Linear(3, 1)


def test_modules_names_and_shapes_decide() -> None:
    assert group_names(Odd())["decay"] == {"bias_layer.weight", "position", "head.weight"}


@pytest.mark.parametrize("selector", ["head.*", "h*d.weight", nn.Linear])
def test_further_parameters_are_named_by_pattern_or_class(selector: Any) -> None:
    assert "head.weight" in group_names(Odd(), no_decay=[selector])["no_decay"]


def test_the_names_that_a_model_lists_itself_do_not_decay() -> None:
    class Vision(Odd):
        def no_weight_decay(self) -> set[str]:
            return {"position", "distilled"}  # models of timm also list what they have with some options only

    assert group_names(Vision())["decay"] == {"bias_layer.weight", "head.weight"}


def test_frozen_parameters_are_included_or_left_out() -> None:
    model = bert()
    model.bert.requires_grad_(False)
    assert group_names(model, include_frozen=False) == {"decay": {"classifier.weight"}, "no_decay": {"classifier.bias"}}
    assert group_names(model) == group_names(bert())


# ---- depth


def test_layers_of_transformers_are_found() -> None:
    names = group_names(bert(), layer_decay=0.5)
    assert {name.split(".")[1] for name in names["layer_0_no_decay"]} == {"embeddings"}
    assert {name.split(".")[3] for name in names["layer_3_decay"]} == {"2"}
    assert names["layer_4_decay"] == {"bert.pooler.dense.weight", "classifier.weight"}
    assert "layer_0_decay" not in names


@pytest.mark.parametrize(("make", "top"), [(bert, 4), (gpt2, 3), (llama, 3)])
def test_each_layer_has_the_rate_of_the_next_times_the_decay(make: Make, top: int) -> None:
    for name, rate in rates(make(), layer_decay=0.5).items():
        assert rate == 0.5 ** (top - int(name.split("_")[1]))


def test_without_parameters_behind_the_layers_the_last_layer_has_the_full_rate() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh()) for _ in range(3)))
    assert rates(model, layer_decay=0.1) == {f"layer_{n}_decay": pytest.approx(0.1 ** (3 - n)) for n in (1, 2, 3)}


def test_lists_within_blocks_do_not_count() -> None:
    experts = [nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(4)]) for _ in range(2)]
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList(nn.Sequential(expert) for expert in experts))
    assert {name.split("_")[1] for name in group_names(model, layer_decay=0.5)} == {"0", "1", "2"}


def test_named_layers_are_in_the_order_of_the_names() -> None:
    names = group_names(t5(), layer_decay=0.5, layers=["decoder.block.*", "encoder.block.*"])
    assert all(name.startswith("decoder.block.1.") for name in names["layer_2_decay"])
    assert all(name.startswith("encoder.block.0.") for name in names["layer_3_decay"])


def test_freezing_changes_no_rate() -> None:
    model = bert()
    model.classifier.requires_grad_(False)
    model.bert.pooler.requires_grad_(False)
    frozen = rates(model, layer_decay=0.5, include_frozen=False)
    assert frozen.items() <= rates(model, layer_decay=0.5).items()
    assert max(frozen.values()) == 0.5


# ---- in a run


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


class Scheduled(LRSchedulerMixin, Trainer): ...


def test_the_history_has_the_rates_by_name_and_schedules_scale_them() -> None:
    torch.manual_seed(0)
    model = Classifier()
    groups = decay_groups(model, lr=0.1, weight_decay=0.1, layer_decay=0.5)
    data = TensorDataset(torch.randn(8, 4), torch.randint(4, (8,)))
    trainer = Scheduled(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=SGD(groups),
        create_scheduler=lambda sgd, plan: OneCycleLR(sgd, [group["lr"] for group in groups], plan.total_steps),
        default_callbacks=(),
    )
    logged = trainer.train(data, num_epochs=1, per_device_batch_size=2).steps[1].logged
    assert logged["layer_2_decay/learning_rate"] == logged["layer_2_no_decay/learning_rate"]
    assert logged["layer_1_decay/learning_rate"] == pytest.approx(0.5 * float(logged["layer_2_decay/learning_rate"]))


def test_a_step_is_that_of_groups_written_by_hand() -> None:
    torch.manual_seed(0)
    model, other = Classifier(), Classifier()
    other.load_state_dict(model.state_dict())
    weights, biases = ([p for p in other.parameters() if (p.ndim > 1) is is_weight] for is_weight in (True, False))
    by_hand = AdamW([{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=0.01)
    inputs = torch.randn(3, 4)
    for net, optimizer in ((model, AdamW(decay_groups(model, lr=0.01, weight_decay=0.1))), (other, by_hand)):
        net(inputs).square().sum().backward()
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr=0.0\): must be a finite number above 0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1\): must be a finite number of at least 0"),
        ({"layer_decay": 1.5}, r"layer_decay=1.5\): must be above 0 and at most 1"),
        ({"layers": ["blocks.*"]}, "has no effect without layer_decay"),
        ({"no_decay": "head"}, r"no_decay='head'\): must be a list"),
    ],
)
def test_invalid_arguments_raise(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.1, **options}
    with pytest.raises(OptionError, match=message):
        decay_groups(Classifier(), **given)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            Classifier,
            {"no_decay": ["blocks.0.0.wieght"]},
            r"no parameter of that name\. Did you mean `blocks",
        ),
        (Classifier, {"no_decay": [nn.Conv2d]}, "calls no submodule that is a Conv2d"),
        (Classifier, {"layer_decay": 0.5, "layers": ["layer.*"]}, "calls no submodule that has the name 'layer"),
        (Odd, {"layer_decay": 0.5}, r"Odd has no list of equal blocks. Name the layers"),
        (t5, {"layer_decay": 0.5}, r"has lists of blocks at encoder\.block, decoder\.block"),
    ],
)
def test_what_is_not_found_raises(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decay_groups(make(), lr=1.0, weight_decay=0.1, **options)
