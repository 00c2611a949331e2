"""Test switching, deleting and adding several adapters of any family on one base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.fingerprint import check_fingerprint
from lightning_peft.core.state.state_dict import StateError, load_state
from tests.helpers import adapted, assert_same_bits, bits, perturb
from tests.kinds import KINDS, MLP
from tests.methods import tiny
from tests.table import METHODS

FAMILIES = {
    "lora": lambda **o: lp.LoRA(r=2, **o),
    "dora": lambda **o: lp.DoRA(r=2, **o),
    "vera": lambda **o: lp.VeRA(r=4, **o),
    "ia3": lambda **o: lp.IA3(**o),
    "serial": lambda **o: lp.BottleneckAdapter(bottleneck_size=4, **o),
    "parallel": lambda **o: lp.BottleneckAdapter(preset="parallel", bottleneck_size=4, **o),
    "prefix": lambda **o: lp.PrefixTuning(num_virtual_tokens=3, **o),
    "prompt": lambda **o: lp.PromptTuning(num_virtual_tokens=3, **o),
    "p_tuning": lambda **o: lp.PTuning(num_virtual_tokens=3, **o),
}
PAIRS = [*((f, f) for f in FAMILIES), ("lora", "prefix"), ("prompt", "parallel"), ("ia3", "prompt")]
IDS = torch.arange(12).view(2, 6) + 1


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def alone(family: str, name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    model = tiny.llama()
    lp.apply(model, FAMILIES[family](name=name))
    load_state(model.eval(), state)
    return logits(model)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_adapters_compute_the_same_as_alone(pair: tuple[str, str]):
    model = tiny.llama()
    base, plain = logits(model), bits(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    for family, name in zip(pair, "ab"):
        lp.apply(model, FAMILIES[family](name=name))
        perturb(model, seed=ord(name), name=name)
    model.eval()
    both = logits(model)
    for family, name in zip(pair, "ab"):
        with lp.active(model, name):
            torch.testing.assert_close(logits(model), alone(family, name, lp.adapter_state(model, name)))
    assert torch.equal(logits(model), both)
    with lp.active(model), lp.disabled(model):
        assert torch.equal(logits(model), base)
    lp.set_active(model, "b", "a")  # adapters run in the order in which they were applied
    assert torch.equal(logits(model), both)

    lp.delete_adapter(model, "a")
    torch.testing.assert_close(logits(model), alone(pair[1], "b", lp.adapter_state(model, "b")))
    report = injection_state(model).report
    assert {entry.adapter for entry in report.entries} == {"b"}
    assert report.total == sum(p.numel() for p in model.parameters())
    lp.delete_adapter(model, "b")
    assert torch.equal(logits(model), base)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(p.requires_grad for p in model.parameters())
    assert_same_bits(bits(model), plain)
    assert injection_state(model) is None


def test_deleting_leaves_hosts_of_others_alone():
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, name="a", targets=["up", "mid"]), lp.LoRA(r=2, name="b", targets=["mid"]))
    lp.delete_adapter(model, "a")
    assert [name for name, _ in hosts(model)] == ["mid"]
    assert type(model.up) is nn.Linear
    assert not model.down.weight.requires_grad


def test_what_cannot_be_deleted():
    model = adapted(METHODS["lora"], KINDS["linear"])
    with pytest.raises(ValueError, match=r"no adapter named 'b'; the model has \['default'\]"):
        lp.delete_adapter(model, "b")
    lp.merge(model)
    with pytest.raises(ValueError, match=r"'default' is merged into the base: call lp.unmerge"):
        lp.delete_adapter(model, "default")


def test_an_adapter_deleted_within_active_does_not_come_back():
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, name="a"), lp.LoRA(r=2, name="b"))
    with lp.active(model, "b"):
        lp.delete_adapter(model, "a")
    assert model.up.adapters.active == ("b",)
    lp.merge(model)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()
        self.norm = nn.BatchNorm1d(3)
        self.out = nn.Linear(3, 2)
        self.norm.weight.requires_grad_(False)

    def forward(self, x):
        return self.out(self.norm(self.inner(x)))


def test_a_module_around_an_adapted_one_is_frozen_too():
    model = Outer()
    lp.apply(model.inner, lp.LoRA(r=2, name="a", bias="all", trainable=["head"]))
    trained = {id(p) for p in lp.trainable_parameters(model.inner)}
    assert model.out.weight.requires_grad
    report = lp.apply(model, lp.LoRA(r=2, name="b", targets=["out"]))
    new = {id(p) for p in model.out.adapters["b"].parameters()}
    assert {id(p) for p in lp.trainable_parameters(model)} == trained | new
    record = injection_state(model)
    assert "_peft_injection" not in vars(model.inner)
    assert record.trained_base["a"].modules == ("inner.head",)
    assert "inner.up.bias" in record.trained_base["a"].parameters
    assert set(report.modules) >= {"inner.up", "inner.head", "out"}
    assert report.trainable == sum(p.numel() for p in lp.trainable_parameters(model))
    assert not model.norm.training
    fresh = Outer()
    lp.apply(fresh, lp.LoRA(r=2, name="a", targets=["inner.up"]))
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k}, strict=False)
    check_fingerprint(fresh, record.fingerprint)
    lp.unload(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]


def test_methods_cannot_be_applied_to_a_part_of_an_adapted_model():
    model = Outer()
    lp.apply(model, lp.LoRA(r=2))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(lp.InjectionError, match=r"up carries adapters .* apply further methods to that model"):
        lp.apply(model.inner, lp.LoRA(r=2, name="b"))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_a_merged_model_is_not_taken_for_another_base():
    model = adapted(METHODS["lora"], KINDS["linear"])
    saved = injection_state(model).fingerprint
    check_fingerprint(model, saved)
    lp.merge(model)
    with pytest.raises(StateError, match=r"adapters are merged into the base.*lp.unmerge\(model\) first"):
        check_fingerprint(model, saved)
