"""Parity with Hugging Face PEFT 0.21.2 where it is right: outputs and gradients from the same weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts
from tests.helpers import close, perturb
from tests.kinds import KINDS, Convolutions

peft = pytest.importorskip("peft")


@dataclass(frozen=True)
class Case:
    """The same adapter, configured here and in PEFT."""

    kind: str
    targets: list[str]
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


class PlainConv(nn.Module):
    """Convolutions with the options that PEFT gets right: stride and zero padding."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.body = Convolutions(
            conv(3, 6, 3, padding=1), conv(6, 6, 3, padding=1, stride=2), conv(6, 4, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


CASES: dict[str, Case] = {
    "linear": Case("linear", ["up", "mid", "down"]),
    "linear 4-D": Case("linear_4d", ["up", "mid", "down"]),
    "rslora": Case("linear", ["up", "down"], {"use_rslora": True}, {"use_rslora": True}),
    "patterns": Case(
        "linear",
        ["up", "mid", "down"],
        {"rank_pattern": {"mid": 4}, "alpha_pattern": {"down": 9}},
        {"rank_pattern": {"mid": 4}, "alpha_pattern": {"down": 9}},
    ),
    "bias all": Case("linear", ["up"], {"bias": "all"}, {"bias": "all"}),
    "bias lora_only": Case("linear", ["up"], {"bias": "lora_only"}, {"bias": "lora_only"}),
    "gqa": Case("llama", ["q_proj", "k_proj", "v_proj", "down_proj"]),
    "conv1d of gpt2": Case("gpt2", ["c_attn", "c_proj", "c_fc"], {}, {"fan_in_fan_out": True}),
    "embedding": Case("embedding", ["token", "position", "out"]),
    "fused qkv": Case("fused_qkv", ["qkv.0", "qkv.1", "qkv.2"]),
    "conv1d": Case("1", ["0", "2", "4"]),
    "conv2d": Case("2", ["0", "2", "4"]),
    "conv3d": Case("3", ["0", "2", "4"]),
    "batch norm": Case("resnet", ["stem", "fc"]),
    "attention": Case("mha_batch_first", ["layers.0", "layers.1", "layers.2"]),
}


def _model(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if kind in KINDS:
        return KINDS[kind].build(), KINDS[kind].batch()
    return PlainConv(int(kind)), (torch.randn(2, 3, *[5] * int(kind)),)


def _pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our matrix and PEFT's parameter, for each A and B."""
    pairs = []
    for name, host in hosts(ours):
        for parameter, adapter in host.adapters["default"].weights().items():
            layer = theirs.get_submodule(name)
            if parameter == "out_proj.weight":
                layer = layer.base_layer.out_proj
            if "default" in getattr(layer, "lora_embedding_A", {}):
                a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            pairs += [(adapter.lora_A, a), (adapter.lora_B, b)]
    return pairs


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case: str):
    given = CASES[case]
    model, batch = _model(given.kind)
    base = copy.deepcopy(model)
    ours = lp.LoRA(r=2, alpha=3, targets=given.targets, **given.ours)
    report = lp.apply(model, ours)
    perturb(model, scale=0.3)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=given.targets, **given.theirs)
    wrapped = peft.get_peft_model(base, config).train()
    base = wrapped.base_model.model
    pairs = _pairs(model, base)
    assert len(pairs) == 2 * len([k for k in wrapped.state_dict() if "lora_A" in k or "lora_embedding_A" in k])
    assert report.trainable == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    with torch.no_grad():
        for matrix, parameter in pairs:
            parameter.copy_(matrix.reshape(parameter.shape))
    if given.kind == "mha_batch_first":
        # PEFT adds the output projection's update twice (it merges it by hand, then calls merge). With B at zero, only
        # the input projection is compared; tests/methods/test_dense.py compares our output projection with W + s B A.
        with torch.no_grad():
            for matrix, parameter in pairs[3::4]:
                matrix.zero_()
                parameter.zero_()
        pairs = [pair for i, pair in enumerate(pairs) if i % 4 < 2]
    for module in (model, base):  # PEFT leaves BatchNorm training, where it normalises by the batch
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()

    gradients = []
    outputs = []
    for module, index in ((model, 0), (base, 1)):
        inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in batch]
        outputs.append(module(*inputs))
        outputs[-1].pow(2).sum().backward()
        gradients.append([pair[index].grad for pair in pairs])
        gradients[-1] += [x.grad for x in inputs if x.is_floating_point()]
        gradients[-1] += [p.grad for name, p in module.named_parameters() if name.endswith("bias") and p.requires_grad]
    close(outputs[0], outputs[1])
    assert len(gradients[0]) == len(gradients[1])
    for mine, other in zip(*gradients):
        scale = other.abs().max().clamp(min=1)
        close(mine / scale, other.reshape(mine.shape) / scale, 2e-5)
