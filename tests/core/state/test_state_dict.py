"""Test the content of the trainable state, and which states cannot be loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.names import canonical
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.fingerprint import check_fingerprint, fingerprint
from lightning_peft.core.state.state_dict import StateError, check_state, load_state
from tests.helpers import adapted, assert_same_bits, bits
from tests.kinds import KINDS, MLP, Kind
from tests.table import METHODS

LINEAR = KINDS["linear"]


@pytest.fixture
def model() -> nn.Module:
    return adapted(METHODS["lora"], LINEAR)


def test_holds_adapters_heads_and_moved_buffers_and_no_more():
    kind = KINDS["resnet"]
    model = adapted(METHODS["lora"], kind, trainable=["fc"], targets=["stem"], train_norm_stats=True)
    assert set(lp.adapter_state(model)) == {"stem.adapters.default.lora_A", "stem.adapters.default.lora_B"} | {
        "fc.weight",
        "fc.bias",
    }
    model(*kind.batch())
    moved = {f"norms.{i}.{b}" for i in range(3) for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved <= set(lp.adapter_state(model))
    assert set(lp.adapter_state(model, "default")) == {f"stem.adapters.default.lora_{m}" for m in "AB"}


@pytest.mark.parametrize("around", ["compiled", "wrapped"])
def test_moved_buffers_are_seen_through_what_is_around_the_model(around: str):
    kind = KINDS["resnet"]
    model = adapted(METHODS["lora"], kind, train_norm_stats=True)
    outer = torch.compile(model, backend="eager") if around == "compiled" else nn.ModuleDict({"inner": model})
    model(*kind.batch())
    prefix = "" if around == "compiled" else "inner."
    assert f"{prefix}norms.0.running_mean" in lp.adapter_state(outer)


def test_frozen_adapters_are_held_all_the_same(model: nn.Module):
    keys = set(lp.adapter_state(model))
    model.requires_grad_(False)
    assert set(lp.adapter_state(model)) == keys


def test_the_state_of_one_adapter_is_not_that_of_its_namesakes():
    model = adapted(METHODS["lora"], LINEAR, name="task")
    lp.apply(model, lp.LoRA(r=2, name="task2"))
    assert all(".adapters.task." in key for key in lp.adapter_state(model, "task"))
    assert len(lp.adapter_state(model, "task")) == 6
    assert len(lp.adapter_state(model)) == 12


def _without(state, key):
    return {k: v for k, v in state.items() if k != key}


A = "up.adapters.default.lora_A"
WRONG = {
    "missing": (lambda s: _without(s, A), f"missing: {A}"),
    "truncated": (lambda s: {}, r"missing: .* and 1 more"),
    "foreign": (lambda s: {"x.weight": torch.ones(1)}, "unknown to this model: x.weight"),
    "renamed": (
        lambda s: {k.replace("up.", "upp."): v for k, v in s.items()},
        rf"missing: {A}, .*nearest to the first: upp.adapters.default.lora_A",
    ),
    "other name": (
        lambda s: {k.replace("default", "mine"): v for k, v in s.items()},
        "unknown to this model: down.adapters.mine.lora_A.*nearest to the first: down.adapters.default.lora_A",
    ),
    "other rank": (lambda s: {**s, A: torch.ones(3, 6)}, rf"{A}: \(3, 6\) in the file, \(2, 6\) in the model"),
    "empty": (lambda s: {**s, A: torch.ones(0)}, rf"{A}: \(0,\) in the file"),
    "nan": (lambda s: {**s, A: torch.full((2, 6), torch.nan)}, f"{A}: holds NaN or infinity"),
    "infinite": (lambda s: {**s, A: torch.full((2, 6), torch.inf)}, f"{A}: holds NaN or infinity"),
    "wrong head": (lambda s: {**s, "head.weight": torch.ones(5, 8)}, r"head.weight: \(5, 8\) in the file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_does_not_fit_is_refused_by_key_and_loads_nothing(model: nn.Module, wrong: str):
    change, message = WRONG[wrong]
    before = bits(model)
    with pytest.raises(StateError, match=message):
        load_state(model, change(lp.adapter_state(model)))
    assert_same_bits(bits(model), before)


def test_a_state_may_bring_its_frozen_base_too(model: nn.Module):
    other = adapted(METHODS["lora"], Kind(MLP, LINEAR.inputs, LINEAR.matrices), seed=3)
    check_state(other, model.state_dict())
    load_state(other, model.state_dict())
    assert_same_bits(bits(other), bits(model))


def test_loading_keeps_types_and_objects(model: nn.Module):
    parameters = dict(model.named_parameters())
    load_state(model, {k: v.double() for k, v in lp.adapter_state(model).items()})
    assert all(p is parameters[k] and p.dtype == torch.float32 for k, p in model.named_parameters())


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("_orig_mod.up.weight", "up.weight"),
        ("body._orig_mod.up._checkpoint_wrapped_module.weight", "body.up.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("weight", "weight"),
    ],
)
def test_canonical(key: str, plain: str):
    assert canonical(key) == plain


def test_the_same_base_in_another_precision_is_the_same(model: nn.Module):
    saved = injection_state(model).fingerprint
    check_fingerprint(model, saved)
    check_fingerprint(model.to(torch.bfloat16), saved)
    check_fingerprint(adapted(METHODS["lora"], LINEAR, seed=5), saved)


def test_the_fingerprint_is_plain_values(model: nn.Module):
    assert {type(v) for values in fingerprint(model)["values"].values() for v in values} == {float}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fingerprint(model) == injection_state(model).fingerprint
    finally:
        torch.set_default_dtype(default)


def test_a_different_base_is_refused_with_the_name_of_the_tensor(model: nn.Module):
    saved = injection_state(model).fingerprint
    other = LINEAR.build(seed=1)
    lp.apply(other, lp.LoRA(r=2))
    with pytest.raises(StateError, match=r"different base model: the values of 'up\.weight' differ"):
        check_fingerprint(other, saved)
    with pytest.raises(StateError, match=r"different base model: it has no tensor 'up\.weight'"):
        check_fingerprint(nn.ModuleDict({"upp": nn.Linear(6, 12)}), saved)


def test_large_tensors_are_sampled_within_their_bounds():
    # 50257 x 768 is GPT-2's embedding: float32 cannot represent its last index, and would round past the end.
    model = nn.Module()
    model.register_buffer("table", torch.zeros(1, dtype=torch.int8).expand(50257 * 768))
    assert fingerprint(model)["values"]["table"] == [0.0] * 8
