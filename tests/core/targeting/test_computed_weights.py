"""Test that layers with computed weights and lazy layers are refused if targeted, and otherwise ignored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lightning_peft as lp
from lightning_peft.core.record import injection_state
from lightning_peft.trainer.audit import audit_head
from tests.helpers import assert_same_bits, bits

COMPUTED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
OTHERS = [lp.BitFit(), lp.LinearProbe(), lp.LoRA(r=2, targets="up"), lp.LoRA(r=2, exclude=["special", "second"])]


def chain(**layers: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, layer in {"up": nn.Linear(4, 8), **layers, "head": nn.Linear(8, 2)}.items():
        model.add_module(name, layer)
    return model


def build(change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return chain(special=change(nn.Linear(8, 8)), second=change(nn.Linear(8, 8)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("method", OTHERS, ids=lambda m: type(m).__name__)
def test_a_computed_weight_elsewhere_does_not_matter(kind: str, method: lp.PEFTMethod):
    model = build(COMPUTED[kind])
    lp.apply(model, method)
    audit_head(model)
    model.train()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(torch.randn(3, 4)).pow(2).mean().backward()
    torch.optim.SGD(lp.trainable_parameters(model), lr=1.0).step()
    assert any(not torch.equal(p, trained[n]) for n, p in model.named_parameters() if n in trained)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize(
    "method", [lp.LoRA(r=2), lp.DoRA(r=2), lp.SSF(), lp.IA3(targets=["special", "second"], feedforward_targets=())]
)
def test_targeted_ones_are_refused_together(kind: str, method: lp.PEFTMethod):
    model = build(COMPUTED[kind])
    before = bits(model)
    with pytest.raises(
        lp.TargetError, match=r"'special', 'second': the weight is not.*exclude=\['special', 'second'\]"
    ):
        lp.apply(model, method)
    assert_same_bits(bits(model), before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.BitFit(), lp.LoRA(r=2, targets="up")])
def test_lazy_layers_are_refused_until_they_have_run(method: lp.PEFTMethod):
    model = chain(special=nn.LazyLinear(8), norm=nn.LazyBatchNorm1d())
    for call in (lp.inspect, lp.apply):
        with pytest.raises(lp.InjectionError, match=r"special.weight, .*have no shape yet.*Run one batch"):
            call(model, method)
    assert injection_state(model) is None
    model(torch.randn(3, 4))
    lp.apply(model, method)
    model(torch.randn(3, 4)).sum().backward()
