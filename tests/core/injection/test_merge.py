"""Test which merges are refused, and that a refused merge changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapters.low_rank import add_products
from lightning_peft.core.injection.attach import attach
from lightning_peft.core.injection.merge import MergeError
from lightning_peft.core.targeting.sites import weight_sites
from tests.core.adapters.test_stack import Add
from tests.helpers import adapted, assert_same_bits, bits, evaluate, perturb
from tests.kinds import KINDS, MLP
from tests.table import METHODS

LINEAR = KINDS["linear"]


def _tied() -> nn.Module:
    return adapted(METHODS["lora"], KINDS["tied"])


def _quantised() -> nn.Module:
    model = adapted(METHODS["lora"], LINEAR)
    model.mid.weight = nn.Parameter(torch.ones(10, 12, dtype=torch.int8), requires_grad=False)
    return model


def _infinite() -> nn.Module:
    model = adapted(METHODS["lora"], LINEAR)
    model.down.adapters["default"].lora_A.data[0, 0] = torch.inf
    return model


def _overflowing() -> nn.Module:
    model = adapted(METHODS["lora"], LINEAR).half()
    for parameter in model.down.adapters.parameters():
        parameter.data.fill_(1e4)
    return model


def _merged() -> nn.Module:
    model = adapted(METHODS["lora"], LINEAR)
    lp.merge(model)
    return model


def _no_weight() -> nn.Module:
    model = adapted(METHODS["lora"], LINEAR)
    attach(model, "down", "add", Add(1.0))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_tied, r"embed.weight is the same tensor as \['lm_head.weight'\].*untie=True\) gives it its own copy"),
        (_quantised, r"'mid' \(Linear\) has a quantised weight, which cannot hold the merged values"),
        (_infinite, "down.weight would hold NaN or infinity"),
        (_overflowing, "down.weight would hold NaN or infinity"),
        (_merged, "'up' already has merged adapters: call lp.unmerge"),
        (_no_weight, r"'add' at 'down' \(Add\) does not change weights"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_changes(make, message: str):
    model = make()
    before = bits(model)
    with pytest.raises(MergeError, match=message):
        lp.merge(model)
    assert_same_bits(bits(model), before)


def test_one_adapter_of_a_tied_model_merges_where_nothing_is_tied():
    kind = KINDS["tied"]
    model = kind.build()
    lp.apply(model, lp.LoRA(r=2, targets=["fc1", "fc2"]))
    expected = evaluate(perturb(model), kind)
    lp.unload(model, merge=True)
    torch.testing.assert_close(evaluate(model, kind), expected)
    assert model.lm_head.weight is model.embed.weight


def test_one_of_two_is_merged_and_the_other_runs_on():
    model = adapted(METHODS["lora"], LINEAR)
    lp.apply(model, lp.LoRA(r=3, name="second", targets=["down"]))
    perturb(model, name="second")
    expected, before = evaluate(model, LINEAR), bits(model)
    lp.merge(model, "second")
    assert torch.equal(model.up.weight, before["up.weight"])
    assert not torch.equal(model.down.weight, before["down.weight"])
    torch.testing.assert_close(evaluate(model, LINEAR), expected)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)


def test_merging_keeps_parameters_types_and_what_trains():
    model = adapted(METHODS["lora"], LINEAR).to(torch.bfloat16)
    parameters = {name: (p, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    lp.merge(model)
    assert {n: (p, p.dtype, p.requires_grad) for n, p in model.named_parameters()} == parameters


def test_merging_into_bfloat16_rounds_once():
    model = adapted(METHODS["lora"], LINEAR).to(torch.bfloat16)
    lora = model.up.adapters["default"]
    expected = (model.up.weight.float() + lora.scale * (lora.lora_B @ lora.lora_A)).bfloat16()
    lp.merge(model)
    assert torch.equal(model.up.weight, expected)


@pytest.mark.parametrize("verb", [lp.set_active, lambda model: lp.disabled(model).__enter__()])
def test_adapters_of_a_merged_model_cannot_be_disabled(verb):
    model = _merged()
    with pytest.raises(ValueError, match=r"merged into the base: call lp.unmerge\(model\) first"):
        verb(model)


def test_unload_of_a_merged_model():
    plain, model = LINEAR.build(), _merged()
    assert_same_bits(bits(lp.unload(model)), bits(plain))
    model = _merged()
    weight = model.up.weight.detach().clone()
    assert torch.equal(lp.unload(model, merge=True).up.weight, weight)


def test_unload_inside_a_larger_model_gives_its_gradients_back():
    inner = MLP()
    inner.up.bias.requires_grad_(False)
    outer = nn.ModuleDict({"inner": inner, "other": nn.Linear(2, 2)})
    lp.apply(inner, lp.LoRA(r=2))
    lp.unload(outer)
    assert [n for n, p in outer.named_parameters() if not p.requires_grad] == ["inner.up.bias"]
    assert "_peft_injection" not in vars(inner)


def _hybrid() -> nn.Module:
    """LoRA on every layer; ``down`` also has an adapter that does not change weights, followed by a second LoRA."""
    model = adapted(METHODS["lora"], LINEAR)
    attach(model, "down", "add", Add(1.0))
    lp.apply(model, lp.LoRA(r=2, name="after", targets=["mid", "down"]))
    return perturb(model)


def test_a_partial_merge_folds_what_it_can_and_names_the_rest():
    model = _hybrid()
    expected, before = evaluate(model, LINEAR), bits(model)
    with pytest.raises(MergeError, match=r"'add' at 'down'.*; 'after' at 'down' .*\(lp.merge\(model, partial=True\)"):
        lp.merge(model)
    assert lp.merge(model, partial=True) == [
        "'add' at 'down' (Add) does not change weights",
        "'after' at 'down' (LoRAAdapter) runs after 'add', but merged it would run before it",
    ]
    assert model.mid.adapters.merged_names == ("default", "after")
    assert model.down.adapters.merged_names == ("default",)
    torch.testing.assert_close(evaluate(model, LINEAR), expected)
    with pytest.raises(MergeError, match=r"\['add', 'after'\] are active but not merged, and would be lost"):
        lp.unload(model, merge=True)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)
    assert torch.equal(evaluate(model, LINEAR), expected)


def test_a_partial_merge_of_a_tied_model_leaves_what_is_tied():
    model = _tied()
    expected = evaluate(model, KINDS["tied"])
    (left,) = lp.merge(model, partial=True)
    assert "embed.weight is the same tensor" in left
    torch.testing.assert_close(evaluate(model, KINDS["tied"]), expected)


def test_a_merge_that_could_fold_nothing_is_refused():
    model = LINEAR.build()
    attach(model, "down", "add", Add(1.0))
    with pytest.raises(MergeError, match="does not change weights"):
        lp.merge(model, partial=True)


def test_untie_gives_a_tied_weight_its_own_copy():
    kind = KINDS["tied"]
    model = _tied()
    weight, expected, before = model.embed.weight, evaluate(model, kind), bits(model)
    lp.merge(model, untie=True)
    torch.testing.assert_close(evaluate(model, kind), expected)
    assert model.lm_head.weight is weight
    assert_same_bits({"w": model.lm_head.weight}, {"w": before["lm_head.weight"]})
    lp.unmerge(model)
    assert model.embed.weight is weight
    assert_same_bits(bits(model), before)
    lp.merge(model, untie=True)
    lp.unload(model, merge=True)
    assert model.embed.weight is not model.lm_head.weight
    torch.testing.assert_close(evaluate(model, kind), expected)


def test_two_modules_of_one_weight_that_change_alike_keep_it_in_common():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    lp.apply(model, lp.LoRA(r=2, targets=["0", "1"], seed=0))
    perturb(model)
    model[1].adapters.load_state_dict(model[0].adapters.state_dict())
    x, before = torch.randn(3, 6), bits(model)
    expected = model(x)
    lp.merge(model)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model(x), expected)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("shape", [(3, 5), (700, 900), (3, 400, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_added_in_blocks_and_rounded_once(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    *batch, out, inside = shape
    matrix = torch.randn(shape, generator=generator).to(dtype)
    pairs = [
        (torch.randn(*batch, r, inside, generator=generator), torch.randn(*batch, out, r, generator=generator))
        for r in (2, 3)
    ]
    exact = matrix.double() + sum(b.double() @ a.double() for a, b in pairs)
    found = add_products(matrix.mT.contiguous().mT, pairs, torch.float32)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_errors_of_merging_nothing_or_too_much():
    model = KINDS["linear"].build()
    lp.apply(model, lp.LoRA(r=2, name="a"), lp.BottleneckAdapter(targets=["up", "down"], bottleneck_size=2, name="b"))
    with pytest.raises(
        MergeError, match=r"'b' at 'up' .*, and so at 1 more place \(lp.merge\(model, partial=True\) merges"
    ):
        lp.merge(model)
    with pytest.raises(
        MergeError, match=r"to unload without it, first activate the adapters to keep with lp.set_active\(model, ...\)"
    ):
        lp.unload(model, merge=True)
    lp.set_active(model)
    for merge in (lp.merge, lambda model: lp.unload(model, merge=True)):
        with pytest.raises(MergeError, match=r"none of \['a', 'b'\] is active: call lp.set_active"):
            merge(model)
    lp.set_active(model, "a")
    assert lp.merge(model) == []


class Gain(lp.WeightAdapter):
    """W' = W + g W: written as a sum, although the change depends on the weight."""

    def __init__(self, site, gain: float = 0.3) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.full((site.shape[-2], 1), gain))

    def delta(self, weight: torch.Tensor) -> torch.Tensor:
        return self.gain * weight


@pytest.mark.parametrize(("first", "commutes"), [("lora", False), ("gain", True)])
def test_an_adapter_that_reads_the_weight_is_merged_alone_only_where_the_order_makes_no_difference(first, commutes):
    model = LINEAR.build()
    site = weight_sites(model)["down"]
    if first == "lora":
        lp.apply(model, lp.LoRA(r=2, targets="down"))
        perturb(model)
    else:
        attach(model, "down", "default", Gain(site, 0.7))
    attach(model, "down", "second", Gain(site))
    both, before = evaluate(model, LINEAR), bits(model)
    if commutes:
        lp.merge(model, "second")
        torch.testing.assert_close(evaluate(model, LINEAR), both)
    else:
        with pytest.raises(MergeError, match="'second' at 'down' runs after 'default', but merged alone it would run"):
            lp.merge(model, "second")
        assert_same_bits(bits(model), before)
        lp.merge(model)
        torch.testing.assert_close(evaluate(model, LINEAR), both)
