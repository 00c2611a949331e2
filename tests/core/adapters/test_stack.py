"""Test the stack of adapters on a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.adapters.base import Adapter, WeightAdapter
from lightning_peft.core.adapters.lookup import adapter_names, hosts
from lightning_peft.core.injection.attach import attach, detach
from lightning_peft.core.names import check_name
from tests.helpers import adapted, evaluate, perturb
from tests.kinds import KINDS, MLP
from tests.table import METHODS


class Add(Adapter):
    """Adds a number to the output."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def run(self, host, call, *args, **kwargs):
        return call(*args, **kwargs) + self.value


class Times(Add):
    def run(self, host, call, *args, **kwargs):
        return call(*args, **kwargs) * self.value


class TimesWeight(WeightAdapter):
    """Multiplies the weight; it does not implement an activation path."""

    def __init__(self, site, value: float) -> None:
        super().__init__(site)
        self.value = nn.Parameter(torch.tensor(value))

    def transform(self, weight: Tensor) -> Tensor:
        return weight * self.value


class TimesMethod(lp.WeightMethod):
    def build(self, site):
        return TimesWeight(site, 3.0)


@pytest.mark.parametrize(
    "name", ["keys", "train", "a.b", "", "a b", "values", None, "forward", "ä", "shared", "merged", "open"]
)
def test_names_that_could_not_be_keys_are_refused(name):
    with pytest.raises(ValueError, match="cannot name an adapter: use letters, digits"):
        check_name(name)


@pytest.mark.parametrize("name", ["default", "lora", "my-task_2", "weight", "0"])
def test_names_that_can_be_keys(name: str):
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, name=name))
    assert adapter_names(model) == (name,)
    assert f"up.adapters.{name}.lora_A" in model.state_dict()


def test_adapters_run_in_order_around_the_original():
    model = nn.Sequential(nn.Identity())
    attach(model, "0", "add", Add(1.0))
    attach(model, "0", "times", Times(2.0))
    x = torch.tensor([5.0])
    assert model(x) == 12
    lp.set_active(model, "times")
    assert model(x) == 10
    with lp.active(model, "add"):
        assert model(x) == 6
    assert model(x) == 10
    detach(model, "0", "times")
    assert model(x) == 5
    detach(model, "0", "add")
    assert type(model[0]) is nn.Identity
    assert list(model.state_dict()) == []


def test_an_adapter_that_modifies_the_weight_keeps_its_order():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3)})
    weight = model["a"].weight.detach().clone()
    lp.apply(model, lp.LoRA(r=2, alpha=2, targets="a", name="first"))
    lp.apply(model, TimesMethod(targets="a", name="second"))
    perturb(model, name="first")
    lora = model["a"].adapters["first"]
    x = torch.randn(2, 3)
    expected = x @ (3 * (weight + lora.lora_B @ lora.lora_A)).T
    torch.testing.assert_close(model["a"](x), expected)
    lp.merge(model)
    torch.testing.assert_close(model["a"](x), expected)


def test_unknown_names_are_refused_with_the_known_ones():
    model = adapted(METHODS["lora"], KINDS["linear"])
    with pytest.raises(ValueError, match=r"no adapter named 'dfault'; the model has \['default'\]"):
        lp.set_active(model, "dfault")
    with pytest.raises(ValueError, match="no adapter named 'b'"), lp.active(model, "b"):
        pass
    with pytest.raises(ValueError, match="no adapter named 'b'"):
        lp.adapter_state(model, "b")
    with pytest.raises(ValueError, match="no adapter named 'b'"):
        lp.merge(model, "b")


def test_contexts_end_with_an_error_too():
    kind = KINDS["linear"]
    model = adapted(METHODS["lora"], kind)
    expected = evaluate(model, kind)
    for context in (lp.disabled(model), lp.active(model)):
        with pytest.raises(RuntimeError, match="shapes cannot"), context:
            model(torch.randn(3, 7))
        assert torch.equal(evaluate(model, kind), expected)


def test_what_is_active_does_not_change_what_trains():
    model = adapted(METHODS["lora"], KINDS["linear"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    lp.set_active(model)
    with lp.disabled(model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_a_module_with_adapters_of_its_own_is_refused_before_anything_changes():
    class Own(nn.Linear):
        adapters = "mine"

    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": Own(3, 3), "c": nn.Linear(3, 3)})
    with pytest.raises(lp.InjectionError, match=r"LoRA 'default': 'b' \(Own\) already has an attribute 'adapters'"):
        lp.apply(model, lp.LoRA(r=2))
    assert not list(hosts(model))
    assert all(p.requires_grad for p in model.parameters())
    lp.apply(model, lp.LoRA(r=2, exclude="b"))


def test_adapters_take_the_mode_of_their_host():
    model = MLP().eval()
    model.up.train()
    lp.apply(model, lp.LoRA(r=2))
    assert [m.training for m in (model, model.up, model.mid)] == [False, True, False]
    assert model.up.adapters["default"].training
    assert not model.mid.adapters["default"].training


def test_an_adapted_root_runs():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    base = model(x, x, x)[0]
    lp.apply(model, lp.LoRA(r=2, targets=["out_proj"]))
    perturb(model)
    assert not torch.allclose(model(x, x, x)[0], base)
    assert list(lp.adapter_state(model)) == [f"adapters.default.out_proj.lora_{m}" for m in "AB"]


def test_an_attention_weight_is_restored_after_the_forward():
    kind = KINDS["mha"]
    model = adapted(METHODS["lora"], kind)
    layer = model.layers[0]
    projection, weight = layer.out_proj, layer.in_proj_weight
    model(*kind.batch())
    assert layer.out_proj is projection
    assert layer.in_proj_weight is weight
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(5, 3, 7))
    assert layer.in_proj_weight is weight


def test_an_output_given_by_keyword():
    model = MLP()
    lp.apply(model, lp.LoRA(r=2))
    perturb(model)
    x = torch.randn(2, 6)
    assert torch.equal(model.up(input=x), model.up(x))
