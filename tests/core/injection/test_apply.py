"""Test applying methods: the plan, refused models, and the record."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import adapter_names, hosts
from lightning_peft.core.record import injection_state
from tests.helpers import adapter_parameters, assert_same_bits, bits
from tests.kinds import KINDS, MLP


def _compiled_inside() -> nn.Module:
    model = MLP()
    model.mid.compile(backend="eager")
    return model


def _sharded() -> nn.Module:
    class FSDPModule(nn.Module):
        pass

    class FSDPLinear(FSDPModule, nn.Linear):
        pass

    return nn.ModuleDict({"a": FSDPLinear(2, 2), "b": nn.Linear(2, 2)})


LORA = lp.LoRA(r=2)
REFUSED = {
    "two of one name": (MLP, [LORA, lp.LoRA(r=4)], r"two methods are named 'default' \(LoRA and LoRA\).*name='lora'"),
    "second is wrong": (MLP, [LORA, lp.LoRA(r=2, name="b", targets="dwon")], "nearest: down"),
    "rank too high": (MLP, [lp.LoRA(r=13)], r"r=13 is above both sides of 'up' \(12x6\).*rank_pattern=\{'up': 6\}"),
    "compiled": (lambda: torch.compile(MLP(), backend="eager"), [LORA], "the model is already compiled"),
    "compiled inside": (_compiled_inside, [LORA], "mid is already compiled.*apply methods first"),
    "compiled by jit": (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), [LORA], "compiled by torch.jit"),
    "sharded": (_sharded, [lp.LoRA(r=1, targets="a")], "a is already sharded.*before fully_shard"),
    "no method": (MLP, [], r"no method to apply: pass one, as in lp.apply\(model, lp.LoRA\(r=8\)\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_is_refused_and_changes_nothing(case: str):
    make, methods, message = REFUSED[case]
    model = make()
    before, classes = bits(model), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        lp.apply(model, *methods)
    assert_same_bits(bits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert injection_state(model) is None


def test_a_part_that_torch_jit_compiled_is_left_alone():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    base = model(x)
    assert list(lp.apply(model, lp.LoRA(r=2)).modules) == ["1"]
    assert not model[0].weight.requires_grad
    torch.testing.assert_close(model(x), base)
    lp.unload(model)
    torch.testing.assert_close(model(x), base)


def test_another_configuration_under_the_same_name_is_refused_by_its_difference():
    model = MLP()
    lp.apply(model, LORA)
    before = bits(model)
    with pytest.raises(
        ValueError, match="carries a LoRA named 'default' with a different configuration: r=2 there, 4 here"
    ):
        lp.apply(model, lp.LoRA(r=4))
    assert_same_bits(bits(model), before)


def test_equal_methods_are_the_same_method():
    model = MLP()
    report = lp.apply(model, lp.LoRA(r=2))
    assert lp.apply(model, lp.LoRA(r=2)) is report
    assert adapter_names(model) == ("default",)


def test_a_later_method_leaves_what_trains_alone():
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, targets="up", trainable="head"))
    report = lp.apply(model, lp.LoRA(r=2, name="later", targets=["up", "down"]))
    assert adapter_names(model) == ("default", "later")
    assert model.head.weight.requires_grad
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    assert report.trainable == sum(p.numel() for p in lp.trainable_parameters(model))
    assert report.modules["up"].count("LoRA") == 2


def test_methods_applied_together_equal_methods_applied_in_turn():
    one, two = KINDS["linear"].build(), KINDS["linear"].build()
    methods = [lp.LoRA(r=2), lp.LoRA(r=3, name="b", bias="all")]
    lp.apply(one, *methods)
    for method in methods:
        lp.apply(two, method)
    assert_same_bits(bits(one), bits(two))
    assert str(injection_state(one).report) == str(injection_state(two).report)


def test_inspect_changes_nothing_and_counts_what_is_shared_once():
    model = MLP()
    before, classes = bits(model), [type(m) for m in model.modules()]
    report = lp.inspect(model, lp.LoRA(r=2, trainable="head"), lp.LoRA(r=2, name="b", trainable="head"))
    assert_same_bits(bits(model), before)
    assert [type(m) for m in model.modules()] == classes
    assert report.trainable == 2 * 2 * (18 + 22 + 18) + 27


class AllocatedElements(TorchDispatchMode):
    """Counts the elements of tensors that are not on the meta device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and not t.is_meta)
        return out


@pytest.mark.parametrize("method", [lp.LoRA, lp.LoHa, lp.MiSS, lp.OFT, lp.AdaLoRA], ids=lambda m: m.__name__)
def test_inspect_counts_without_allocating(method):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(3)))
    with AllocatedElements() as allocated:
        report = lp.inspect(model, method(targets=["0", "1"]))
    assert report.trainable > 0
    assert allocated.count < 4096
    assert lp.inspect(model.to_empty(device="cpu"), method(targets=["0", "1"])).parameters == report.parameters


def test_garbage_collection_is_held_during_injection_and_restored():
    model, runs = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))), []
    gc.callbacks.append(note := lambda phase, info: runs.append(phase))
    try:
        lp.apply(model, lp.LoRA(r=1, targets="type:Linear"))
    finally:
        gc.callbacks.remove(note)
    assert len(runs) <= 2  # no norm inside, perhaps one after it
    assert gc.isenabled()


def test_the_table_groups_repeated_layers():
    report = lp.apply(KINDS["llama"].build(), lp.LoRA(r=2))
    assert ("model.model.layers.*.self_attn.q_proj", 3) in [row[:2] for row in report.rows()]
    assert len(report.rows()) == 7
    text = str(report)
    assert "layers.*.mlp.down_proj" in text
    assert f"{report.trainable:,} of {report.total:,} parameters train" in text


def test_adapters_keep_to_the_seed_and_not_to_the_way_the_model_was_made():
    torch.set_default_dtype(torch.float64)
    model = MLP()
    lp.apply(model, lp.LoRA(r=2, targets=["down", "up"]))
    torch.set_default_dtype(torch.float32)
    other = MLP()
    lp.apply(other, lp.LoRA(r=2))
    for key, value in adapter_parameters(model).items():
        assert torch.equal(value, adapter_parameters(other)[key])


def test_heads_stay_in_float32_and_fit_between_their_neighbours():
    model = MLP().to(torch.bfloat16)
    lp.apply(model, lp.LoRA(r=2, trainable="head"))
    assert model.head.weight.dtype == torch.float32
    assert model.up.weight.dtype == torch.bfloat16
    assert model(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    lp.unload(model)
    assert model.head.weight.dtype == torch.bfloat16
    later = MLP()
    lp.apply(later, lp.LoRA(r=2, trainable="head"))
    later.to(torch.bfloat16)
    assert later.head.weight.dtype == torch.float32
    assert later(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_frozen_norms_stay_in_eval_and_trained_ones_do_not():
    model = KINDS["resnet"].build()
    report = lp.apply(model, lp.LoRA(r=2, targets=["stem"], trainable=["norms.1"]))
    model.train()
    assert [norm.training for norm in model.norms] == [False, True, False]
    assert "2 frozen norm layers keep their running statistics" in report.notes
    moving = KINDS["resnet"].build()
    lp.apply(moving, lp.LoRA(r=2, targets=["stem"], train_norm_stats=True))
    assert all(norm.training for norm in moving.train().norms)


def test_a_model_without_hosts_has_none():
    assert list(hosts(MLP())) == []
    assert adapter_names(MLP()) == ()
