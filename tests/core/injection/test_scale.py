"""``lp.scale``: 0 is the base, 1 is the adapter bit for bit, and a scaled adapter is merged, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts
from tests.helpers import adapted, assert_same_bits, bits, close, differ, evaluate, perturb
from tests.kinds import KINDS
from tests.methods.tiny import ViT
from tests.table import METHODS, cells

_WITHOUT = ("prefix", "prefix_gate", "prompt", "ptuning", "visual_prompt", "visual_prompt_deep", "rescale")
_SCALED = [name for name, row in METHODS.items() if not row.selects and name not in _WITHOUT]
#: the updates that are not linear in what is scaled
_PATHS = ("dora", "oft")


def _over(methods: list[str], kinds: list[str]):
    return pytest.mark.parametrize(("row", "kind"), list(cells("two", methods, kinds)))


@_over(_SCALED, ["linear", "conv2d", "embedding", "encoder"])
def test_from_the_base_to_the_adapter(row, kind):
    model = adapted(row, kind)
    model.eval()
    before, whole = bits(model), evaluate(model, kind)
    with lp.disabled(model):
        base = evaluate(model, kind)
    lp.scale(model, "default", 0.0)
    close(evaluate(model, kind), base)
    with lp.scale(model, "default", 0.5):
        half = evaluate(model, kind)
        differ(half, base)
        lp.scale(model, "default", 2.0)
    close(evaluate(model, kind), base)
    lp.scale(model, "default", 1.0)
    assert_same_bits(bits(model), before)
    assert torch.equal(evaluate(model, kind), whole)


@_over([name for name in _SCALED if name not in _PATHS], ["linear"])
def test_the_update_of_a_weight_is_multiplied(row, kind):
    def updates(factor):
        model = adapted(row, kind).eval()
        lp.scale(model, "default", factor)
        found = []
        for _, host in hosts(model):
            for part in host.adapters["default"].weights().values():
                weight = part.layout.matrix(host.get_parameter(part.parameter))
                found.append((part.transform(weight) - weight).detach())
        return found

    for half, whole in zip(updates(0.5), updates(1.0)):
        close(half, 0.5 * whole)


@_over([name for name in _SCALED if METHODS[name].mergeable], ["linear"])
def test_a_scaled_adapter_merges_saves_and_loads(row, kind, tmp_path):
    model = adapted(row, kind).eval()
    lp.scale(model, "default", 0.6)
    half = evaluate(model, kind)
    lp.save_adapter(model, tmp_path / "half")
    lp.merge(model)
    with pytest.raises(ValueError, match="merged into the base"):
        lp.scale(model, "default", 1.0)
    close(evaluate(model, kind), half, 1e-4)
    loaded = kind.build().eval()
    lp.load_adapter(loaded, tmp_path / "half")
    close(evaluate(loaded, kind), half)
    state = lp.adapter_state(loaded)
    lp.scale(loaded, "default", 1.0)
    assert all(torch.equal(value, state[key]) for key, value in lp.adapter_state(loaded).items())


@_over(["prefix", "prompt", "ptuning"], ["llama"])
def test_what_cannot_be_scaled_says_why(row, kind):
    model = adapted(row, kind)
    before = bits(model)
    with pytest.raises(ValueError, match="is not defined"):
        lp.scale(model, "default", 0.5)
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("deep", [False, True])
def test_a_visual_prompt_is_refused(deep):
    model = ViT()
    lp.apply(model, lp.VisualPromptTuning(2, deep=deep))
    with pytest.raises(ValueError, match="is not defined"):
        lp.scale(model, "default", 0.5)


def test_a_trained_base_is_refused_and_a_loaded_one_is_scaled(tmp_path):
    kind = KINDS["linear"]
    model = kind.build().eval()
    base = evaluate(model, kind)
    lp.apply(model, lp.BitFit())
    perturb(model)
    with pytest.raises(ValueError, match=r"'default' \(BitFit\) trains parameters of the base in place"):
        lp.scale(model, "default", 0.5)
    trained = evaluate(model, kind)
    lp.save_adapter(model, tmp_path / "a")
    loaded = kind.build().eval()
    lp.load_adapter(loaded, tmp_path / "a")
    close(evaluate(loaded, kind), trained)
    with lp.scale(loaded, "default", 0.0):
        close(evaluate(loaded, kind), base)
    assert torch.equal(evaluate(loaded, kind), trained)


def test_a_head_that_trains_in_full_is_not_scaled(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    plain.load_state_dict(model.state_dict())
    lp.apply(model, lp.LoRA(r=2, targets=["0"], trainable=["2"]))
    perturb(model)
    with torch.no_grad():
        model[2].weight.add_(1)
    head = model[2].weight.detach().clone()
    lp.save_adapter(model, tmp_path / "a")
    lp.load_adapter(plain, tmp_path / "a")
    for each in (model, plain):
        x = torch.randn(3, 4)
        full = each(x)
        with lp.scale(each, "default", 0.0):
            differ(each(x), full)
        assert torch.equal(each(x), full)
    lp.scale(plain, "default", 0.0)
    weight = next(value for key, value in plain.named_parameters() if key.startswith("2.adapters") and "weight" in key)
    assert torch.equal(weight, head)


def test_tied_tokens_are_scaled_once():
    kind = KINDS["tied"]
    model = kind.build().eval()
    base = evaluate(model, kind)
    lp.apply(model, lp.LoRA(r=2, targets=["fc1"], trainable_tokens=[1, 2, 3]))
    perturb(model)
    before = bits(model)
    whole = evaluate(model, kind)
    lp.scale(model, "default", 0.0)
    close(evaluate(model, kind), base)
    lp.scale(model, "default", 1.0)
    assert torch.equal(evaluate(model, kind), whole)
    assert_same_bits(bits(model), before)


def test_an_adapter_that_changed_since_is_a_new_start():
    kind = KINDS["linear"]
    model = adapted(METHODS["lora"], kind)
    lp.scale(model, "default", 0.5)
    perturb(model, seed=1)
    now = bits(model)
    lp.scale(model, "default", 2.0)
    lp.scale(model, "default", 1.0)
    assert_same_bits(bits(model), now)


def test_arguments():
    kind = KINDS["linear"]
    model = adapted(METHODS["rescale"], kind)
    for factor, name, message in (
        (float("nan"), "default", "must be a finite number"),
        ("1", "default", "must be a finite number"),
        (1.0, "other", "no adapter named 'other'"),
        (0.5, "default", "Declare them in a class attribute neutral"),
    ):
        with pytest.raises(ValueError, match=message):
            lp.scale(model, name, factor)


def test_a_subclass_with_another_formula_does_not_inherit_what_is_neutral():
    from lightning_peft.methods.lora import LoRAAdapter

    class Doubled(LoRAAdapter):
        def delta(self, weight):
            return 2 * super().delta(weight) + 1

    class Plain(LoRAAdapter):
        pass

    assert Doubled.neutral is None
    assert Plain.neutral == LoRAAdapter.neutral
