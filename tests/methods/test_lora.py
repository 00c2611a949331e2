"""LoRA's arguments: what is refused, what is recorded, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import adapter_parameters, close
from tests.kinds import KINDS, MLP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r must be an integer of at least 1, got 0"),
        ({"r": 2.0}, "r must be an integer of at least 1, got 2.0"),
        ({"r": True}, "r must be an integer of at least 1, got True"),
        ({"alpha": 0}, "alpha must be a finite number other than 0, got 0"),
        ({"alpha": math.nan}, "alpha must be a finite number other than 0, got nan"),
        ({"alpha": "16"}, "alpha must be a finite number other than 0, got '16'"),
        ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be a probability in \[0, 1\), got -0.1"),
        ({"bias": "some"}, "bias must be one of 'none', 'lora_only', 'all', got 'some'"),
        ({"init": "zeros"}, "init must be one of 'kaiming', 'gaussian'"),
        ({"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] must be an integer of at least 1, got 0"),
        ({"alpha_pattern": {"up": math.inf}}, "must be a finite number other than 0, got inf"),
        ({"audit": "no"}, "audit must be one of 'error', 'warn', 'off', got 'no'"),
        ({"adapter_dtype": "int8"}, "adapter_dtype must be one of 'float32', .* got 'int8'"),
        ({"name": "a.b"}, "name='a.b' cannot name an adapter"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        lp.LoRA(**arguments)


def test_config_is_every_argument_as_plain_values():
    method = lp.LoRA(r=4, targets=("up",), rank_pattern={"up": 2}, seed=3, trainable="head")
    config = method.config()
    assert config["targets"] == ["up"]
    assert config["trainable"] == "head"
    assert (config["r"], config["rank_pattern"], config["seed"], config["audit"]) == (4, {"up": 2}, 3, "error")
    assert lp.LoRA(**config).config() == config
    assert repr(method).startswith("LoRA(r=4, alpha=16, rank_pattern={'up': 2}")


def test_the_last_matching_pattern_wins():
    model = KINDS["llama"].build()
    lp.apply(
        model, lp.LoRA(r=2, rank_pattern={"q_proj": 3, "layers.1.self_attn.q_proj": 4}, alpha_pattern={"q_proj": 6})
    )
    layers = model.model.model.layers
    adapters = [layer.self_attn.q_proj.adapters["default"] for layer in layers]
    assert [(a.r, a.scale) for a in adapters] == [(3, 2.0), (4, 1.5), (3, 2.0)]
    assert layers[0].self_attn.k_proj.adapters["default"].scale == 8


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 9), (True, 16 / 3)])
def test_scale(rslora: bool, scale: float):
    model = nn.ModuleDict({"fc": nn.Linear(20, 20)})
    lp.apply(model, lp.LoRA(r=9, alpha=16, use_rslora=rslora, targets="fc"))
    assert model["fc"].adapters["default"].scale == scale


def test_a_rank_above_what_a_weight_can_have_is_noted():
    report = lp.inspect(MLP(), lp.LoRA(r=7, targets=["up", "down"]))
    assert report.notes == ["up: r=7, but the weight's rank is at most 6"]


@pytest.mark.parametrize(
    "layer", [nn.Linear(400, 300), nn.Conv2d(40, 300, (2, 5)), nn.Conv2d(80, 300, (2, 5), groups=2)]
)
def test_kaiming_is_that_of_the_layer_itself(layer: nn.Module):
    model = nn.ModuleDict({"it": layer})
    lp.apply(model, lp.LoRA(r=8, targets="it"))
    a, b = adapter_parameters(model).values()
    assert a.shape == (8, 400)
    assert 0.99 / 20 < a.abs().max() <= 1 / 20
    assert b.count_nonzero() == 0


def test_gaussian_has_standard_deviation_one_over_r():
    model = nn.ModuleDict({"it": nn.Linear(4000, 30)})
    lp.apply(model, lp.LoRA(r=4, targets="it", init="gaussian"))
    assert abs(model["it"].adapters["default"].lora_A.std() - 0.25) < 0.01


def test_an_embedding_starts_with_a_at_zero():
    model = nn.ModuleDict({"it": nn.Embedding(300, 400)})
    lp.apply(model, lp.LoRA(r=8, targets="it"))
    a, b = adapter_parameters(model).values()
    assert a.count_nonzero() == 0
    assert abs(b.std() - 1) < 0.05


def test_layers_of_one_shape_start_apart_and_experts_too():
    model = KINDS["experts"].build()
    lp.apply(model, lp.LoRA(r=2, targets="up_proj"))
    first, second = (model.blocks[i].adapters["default"].up_proj.lora_A for i in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_dropout_acts_in_training_only_and_has_the_right_mean():
    model = nn.ModuleDict({"it": nn.Linear(6, 4)})
    lp.apply(model, lp.LoRA(r=2, targets="it", dropout=0.5))
    nn.init.normal_(model["it"].adapters["default"].lora_B)
    x = torch.randn(1, 6)
    expected = model["it"].eval()(x)
    assert torch.equal(model["it"](x), expected)
    outputs = model["it"].train()(x.expand(20_000, 6))
    assert outputs.std(0).min() > 0.01
    close(outputs.mean(0, keepdim=True), expected, 0.1)


def test_biases_train_as_asked():
    def biases(bias: str, target: str = "layers.1") -> list[str]:
        model = KINDS["mha"].build()
        lp.apply(model, lp.LoRA(r=2, targets=[target], bias=bias))
        return [n for n, p in model.named_parameters() if p.requires_grad and "adapters" not in n]

    assert biases("none") == []
    assert biases("lora_only") == ["layers.1.in_proj_bias", "layers.1.out_proj.bias"]
    assert biases("lora_only", "layers.1.out_proj") == ["layers.1.out_proj.bias"]
    assert len(biases("all")) == 6


class Biases(nn.Module):
    """Biases that are not the ``bias`` of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.biases = nn.ParameterList(torch.zeros(4) for _ in range(2))
        self.by_name = nn.ParameterDict({"bias": torch.zeros(4), "scale": torch.ones(4)})
        self.up = nn.Parameter(torch.zeros(2, 4, 6))
        self.up_bias = nn.Parameter(torch.zeros(2, 4))
        self.position_bias = nn.Parameter(torch.zeros(2, 9))
        self.logit_bias = nn.Parameter(torch.zeros(()))


BIASES = {
    *("lstm.bias_ih_l0", "lstm.bias_hh_l0", "attention.in_proj_bias", "attention.out_proj.bias", "biases.0"),
    *("biases.1", "by_name.bias", "up_bias", "logit_bias"),
}


@pytest.mark.parametrize("method", [lp.LoRA(r=2, targets="lstm", bias="all"), lp.BitFit()])
def test_every_bias_trains(method: lp.PEFTMethod):
    model = Biases()
    lp.apply(model, method)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "adapters" not in n} == BIASES
