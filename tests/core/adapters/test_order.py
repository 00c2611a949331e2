"""Test adapters that modify the weight after other adapters on the same module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import close, differ, perturb

MLP_TARGETS = ["0", "2"]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def loha() -> lp.LoHa:
    return lp.LoHa(r=2, targets=MLP_TARGETS, name="later")


DROPOUT = {
    "lora": lambda: lp.LoRA(r=2, dropout=0.5, targets=MLP_TARGETS, name="first"),
    "dora": lambda: lp.DoRA(r=2, dropout=0.5, targets=MLP_TARGETS, name="first"),
    "vera": lambda: lp.VeRA(r=2, dropout=0.5, targets=MLP_TARGETS, name="first"),
}


def test_a_module_adapter_before_a_changed_weight_runs_around_it():
    model, x = mlp(), torch.randn(3, 8, dtype=torch.float64)
    lp.apply(model, lp.BottleneckAdapter(targets=["0"], bottleneck_size=3, name="first"), loha())
    perturb(model)
    bottleneck, weights = model[0].adapters["first"], model[0].adapters["later"]
    hidden = nn.functional.linear(x, weights.transform(model[0].weight), model[0].bias)
    want = bottleneck.run(model[0], lambda x: hidden, x)
    differ(want, hidden)
    close(model[0](x), want)


def test_a_prefix_before_lora_on_an_attention_is_used():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    model, x = Attends(), torch.randn(2, 5, 8)
    lora = lp.LoRA(r=2, targets=["attention"], name="later")
    lp.apply(model, lp.PrefixTuning(3, name="first"), lora)
    perturb(model)
    both = model(x)
    with lp.active(model, "later"):
        differ(both, model(x))
    with lp.active(model, "first"):
        differ(both, model(x))


@pytest.mark.parametrize("first", DROPOUT)
def test_dropout_that_a_later_method_would_lose_is_refused(first):
    model = mlp()
    for call in (lp.inspect, lp.apply):
        with pytest.raises(ValueError, match=r"dropout=0.5 of the .* on '0' would be lost: the LoHaAdapter after it"):
            call(model, DROPOUT[first](), loha())
    assert type(model[0]) is nn.Linear
    lp.apply(model, loha(), DROPOUT[first]())  # if LoRA is last, its dropout has an effect
    perturb(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    differ(model(x), model(x))


def test_adapters_that_are_put_together_later_are_refused_in_training():
    model, x = mlp(), torch.randn(3, 8, dtype=torch.float64)
    lp.apply(model, DROPOUT["lora"]())
    lp.set_active(model)
    lp.apply(model, loha())
    model(x)
    lp.set_active(model, "first", "later")
    with pytest.raises(ValueError, match="Apply the method with dropout last"):
        model(x)
    model.eval()(x)
