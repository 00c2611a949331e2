"""Layers whose class overrides forward: exchanged if it computes the same as the base class, refused otherwise."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

import lightning_peft as lp
from lightning_peft.core.targeting.layouts import layout_of
from lightning_peft.formats.directory.files import read_files
from tests.formats.models import adapted, logits, made_by_peft, moved, read_by_peft, tokens


def falcon() -> nn.Module:
    """A model with its own linear class, whose forward writes out the product."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return moved(FalconForCausalLM(FalconConfig(**sizes, initializer_range=0.2)))


METHODS = {
    "LoRA": (lp.LoRA(2, targets=["query_key_value"]), peft.LoraConfig(r=2, target_modules=["query_key_value"])),
    "AdaLoRA": (
        lp.AdaLoRA(init_r=3, target_r=2, targets=["dense"]),
        peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["dense"]),
    ),
    "LoHa": (lp.LoHa(2, targets=["query_key_value"]), peft.LoHaConfig(r=2, target_modules=["query_key_value"])),
    "LoKr": (lp.LoKr(2, targets=["dense"]), peft.LoKrConfig(r=2, target_modules=["dense"])),
    "OFT": (lp.OFT(4, targets=["dense"]), peft.OFTConfig(oft_block_size=4, target_modules=["dense"])),
    "VeRA": (lp.VeRA(4, targets=["dense"]), peft.VeraConfig(r=4, target_modules=["dense"])),
    "IA3": (
        lp.IA3(targets=["query_key_value"], feedforward_targets=["dense_4h_to_h"]),
        peft.IA3Config(target_modules=["query_key_value", "dense_4h_to_h"], feedforward_modules=["dense_4h_to_h"]),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_falcon_is_exchanged_as_any_linear(method, tmp_path):
    mine, config = METHODS[method]
    base, x = falcon(), tokens()
    ours = adapted(base, mine)
    lp.save_adapter(ours, tmp_path / "ours")
    assert read_files(tmp_path / "ours").config["peft_type"] == config.peft_type.value
    torch.testing.assert_close(logits(read_by_peft(base, tmp_path / "ours"), x), logits(ours, x), rtol=1e-4, atol=1e-4)

    theirs = made_by_peft(base, config, tmp_path / "theirs").eval()
    lp.load_adapter(here := copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(here, x), logits(theirs, x), rtol=1e-4, atol=1e-4)


class Scaled(nn.Linear):
    """Returns twice the product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


class Clipped(nn.Linear):
    """Differs from a Linear only for large inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.clamp(-10, 10), self.weight, self.bias)


class Noisy(nn.Linear):
    """Differs from a Linear only in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + torch.randn_like(y) if self.training else y


class Masked(nn.Linear):
    """Has a mask that is initially all ones."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones(sizes[1], sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Written(nn.Linear):
    """Writes out the product, and counts its calls: a trial forward must not leave a trace."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.weight.t() + self.bias


@pytest.mark.parametrize("cls", [Scaled, Clipped, Noisy, Masked, Written])
def test_a_trial_compares_an_overridden_forward_with_linear(cls):
    layer, state = cls(6, 5), torch.random.get_rng_state()
    found = layout_of(layer)
    assert found is not None
    assert found[0].has_activation is (cls is Written)
    assert layer.training
    assert getattr(layer, "calls", 0) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_adapted_layer_is_still_recognised(tmp_path):
    model = nn.Sequential(Written(6, 6))
    lp.apply(model, lp.LoRA(2, targets=["0"], name="a"))
    found = layout_of(model[0])
    assert found is not None
    assert found[0].has_activation


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["0"]),
        peft.LoHaConfig(r=2, target_modules=["0"]),
        peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["0"]),
    ],
)
def test_peft_files_for_an_overridden_forward_are_refused(config, tmp_path):
    """PEFT's forward adds its change unscaled, but its merge adds it scaled."""
    base = nn.Sequential(Scaled(6, 5))
    made_by_peft(base, config, tmp_path)
    with pytest.raises(lp.FormatError, match="overrides the forward of its class"):
        lp.load_adapter(base, tmp_path)


class Pixel(nn.Module):
    """A single image convolution."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize("options", [{"padding_mode": "circular"}, {"groups": 2}, {"dilation": 2}])
def test_adalora_of_convolutions_that_peft_computes_differently(options, tmp_path):
    base = Pixel(**options)
    lp.save_adapter(adapted(base, lp.AdaLoRA(init_r=3, target_r=2, targets=["conv"])), tmp_path / "ours")
    assert "AdaLoRA supports only a Conv2d" in read_files(tmp_path / "ours").config["reason"]
    if options == {"padding_mode": "circular"}:
        config = peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["conv"])
        made_by_peft(base, config, tmp_path / "theirs")
        with pytest.raises(lp.FormatError, match="padding_mode='circular'"):
            lp.load_adapter(base, tmp_path / "theirs")
