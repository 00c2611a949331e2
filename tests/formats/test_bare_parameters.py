"""Bare parameters called ``weight``, as in mixture-of-experts routers and in other libraries' linear layers."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import lightning_peft as lp
from tests.helpers import close, perturb

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Router(nn.Module):
    """A linear layer that does not derive from ``nn.Linear``."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))
        self.bias = nn.Parameter(torch.randn(12)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Stacked(nn.Module):
    """One matrix and one bias per head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 8))
        self.bias = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hoi->bho", x, self.weight) + self.bias


def net(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Router(bias), nn.ReLU(), nn.Linear(12, 4))


METHODS = [
    lp.LoRA(r=2, targets=["0.weight", "2"]),
    lp.LoRA(r=2, targets=["0.weight"]),
    lp.DoRA(r=2, targets=["0.weight"]),
    lp.VeRA(r=2, targets=["0.weight"]),
    lp.LoHa(r=2, targets=["0.weight"]),
    lp.LoKr(r=2, targets=["0.weight"]),
    lp.OFT(block_size=2, targets=["0.weight"]),
    lp.AdaLoRA(target_r=1, init_r=2, targets=["0.weight"]),
    lp.DyLoRA(r=2, targets=["0.weight"]),
    lp.IA3(targets=["0.weight"], feedforward_targets=()),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{len(m.targets)}")
def test_saved_is_loaded(method, tmp_path):
    model = net()
    report = lp.apply(model, method)
    assert "0" in report.modules
    perturb(model)
    lp.save_adapter(model, tmp_path)
    loaded = net()
    lp.load_adapter(loaded, tmp_path)
    close(loaded(X), model(X))
    if type(method) is lp.LoRA:
        close(PeftModel.from_pretrained(net(), tmp_path).eval()(X), model(X))


def test_ssf_changes_the_bias_with_it(tmp_path):
    model = net(bias=True)
    lp.apply(model, lp.SSF(targets=["0.weight", "2"]))
    perturb(model)
    plain = nn.functional.linear(X, model[0].weight, model[0].bias)
    ssf = model[0].adapters["default"]
    close(model[0](X), plain * ssf.scale + ssf.shift)
    lp.save_adapter(model, tmp_path)
    loaded = net(bias=True)
    lp.load_adapter(loaded, tmp_path)
    close(loaded(X), model(X))


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (Stacked, lp.SSF(targets=["0.weight"]), "cannot have a shift"),
        (Router, lp.SSF(targets=["0.weight"]), "cannot have a shift"),
        (Router, lp.LoRA(r=2, targets=["0.weight"], lora_bias=True), "lora_bias=True"),
        (Stacked, lp.LoRA(r=2, targets=["0.weight"], lora_bias=True), "lora_bias=True"),
    ],
)
def test_methods_that_cannot_adapt_a_bias_are_refused_at_planning(make, method, message):
    model = nn.Sequential(make())
    with pytest.raises(ValueError, match=message):
        lp.apply(model, method)
    assert all(p.requires_grad for p in model.parameters())


def test_ia3_leaves_a_bias_that_does_not_fit():
    model = nn.Sequential(Stacked())
    lp.apply(model, lp.IA3(targets=["0.weight"], feedforward_targets=()))
    perturb(model)
    before = model(X)
    lp.merge(model)
    close(model(X), before)


def test_ssf_beside_a_weight_that_is_computed():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), Router())
    lp.apply(model, lp.SSF(targets=["0"]))
