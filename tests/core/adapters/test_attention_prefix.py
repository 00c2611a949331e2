"""Causal attention to a prefix without a mask, compared with the masked computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_peft as lp
from benchmarks.measure import saved_bytes
from lightning_peft.core.adapters import attention_prefix
from tests.helpers import close, perturb, trained_parameters

LENGTH = 24


class Attention(nn.Module):
    """Causal attention with two query heads for each key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def prefixed(*methods: lp.PrefixTuning) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    lp.apply(model, *methods)
    return perturb(model)


def results(model: nn.Module, x: Tensor, names: list[str] | None = None) -> list[Tensor]:
    model.zero_grad()
    with lp.rows(model, names):
        out = model(x)
    out.square().sum().backward()
    return [out, *(p.grad for p in trained_parameters(model).values())]  # type: ignore[list-item]


@pytest.mark.parametrize("names", [None, ["a", "b"], ["a", "c"], ["a", None]], ids=str)
def test_equals_the_masked_computation(monkeypatch: pytest.MonkeyPatch, names: list[str] | None) -> None:
    methods = [lp.PrefixTuning(n, targets=["0", "1"], kv_dim=8, name=name) for name, n in zip("abc", (3, 3, 2))]
    model, x = prefixed(*methods), torch.randn(2, LENGTH, 16, requires_grad=True)
    if names is None:
        lp.set_active(model, "a", "c")
    monkeypatch.setattr(attention_prefix, "LONG", LENGTH + 1)
    masked = results(model, x, names)
    monkeypatch.setattr(attention_prefix, "LONG", LENGTH)
    for now, before in zip(results(model, x, names), masked, strict=True):
        close(now, before)


def test_memory_grows_with_the_length_not_its_square() -> None:
    model, length = prefixed(lp.PrefixTuning(4, targets=["0", "1"], kv_dim=8)), attention_prefix.LONG

    def saved(length: int) -> int:
        x = torch.randn(1, length, 16, requires_grad=True)
        return saved_bytes(lambda: model(x).sum(), model, [x]).activations

    assert saved(4 * length) < 4.1 * saved(length)
