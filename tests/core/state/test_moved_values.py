"""Test the detection of values that change without gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.state.moved_values import InitialValues
from lightning_peft.core.state.state_dict import load_state
from tests.helpers import assert_same_bits, bits

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one value": lambda w: torch.where(torch.arange(w.numel()).view_as(w) == w.numel() - 1, w + 1, w),
    "rows": lambda w: w.roll(1, 0),
    "columns": lambda w: w.roll(1, -1),
    "signs": lambda w: -w,
    "a sum of nothing": lambda w: w + torch.tensor([1.0, -1.0]).repeat(w.numel() // 2).view_as(w).to(w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2,), (6,), (40, 70), (3, 512, 6)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_that_changes_by_hand_is_seen(shape: tuple[int, ...], dtype: torch.dtype, change: str):
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)])
    start = InitialValues.of(model)
    start.mark(model)
    assert start.moved(model, ()) == set()
    model[1].data = CHANGES[change](model[1].data)
    assert start.moved(model, ()) == {"1"}
    assert start.moved(model, {"1"}) == set()  # it trains


def test_an_empty_and_a_cast_parameter_have_not_moved():
    model = nn.ParameterList([torch.empty(0, 3), torch.randn(())])
    start = InitialValues.of(model)
    start.mark(model)
    model.to(torch.bfloat16)
    assert start.moved(model, ()) == set()
    start.mark(model)
    model[1].data += 1
    assert start.moved(model, ()) == {"1"}


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers(layout: torch.layout):
    """Graph models keep an adjacency matrix, which torch.equal does not compare."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_buffer("adjacency", torch.eye(4).to_sparse(layout=layout))
    model.fixed = nn.Parameter(torch.eye(4).to_sparse(layout=layout), requires_grad=False)
    lp.apply(model, lp.LoRA(r=2))
    assert set(lp.adapter_state(model)) == {"0.adapters.default.lora_A", "0.adapters.default.lora_B"}
    model.adjacency = (2 * torch.eye(4)).to_sparse(layout=layout)
    assert "adjacency" in lp.adapter_state(model)


def test_merged_adapters_do_not_count_as_movement():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    lp.apply(model, lp.LoRA(r=2, targets=["0"]))
    nn.init.ones_(model[0].adapters["default"].lora_B)
    keys = set(lp.adapter_state(model))
    lp.merge(model)
    assert set(lp.adapter_state(model)) == keys
    lp.unmerge(model)
    assert set(lp.adapter_state(model)) == keys


def test_merged_buffers_do_not_count_as_movement(tmp_path: Path):
    def make(name: str, **options: Any) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        lp.apply(model, lp.LoRA(r=2, targets=["0"], name=name, **options))
        return model

    trained = make("task", trainable=["1"])
    trained(torch.randn(8, 4) + 3)  # changes the running statistics
    lp.save_adapter(trained, tmp_path)
    model = make("own")
    lp.load_adapter(model, tmp_path, name="task")
    keys, statistics = set(lp.adapter_state(model)), model[1].running_mean.clone()
    lp.set_active(model, "task")
    lp.merge(model)
    assert not torch.equal(model[1].running_mean, statistics)
    assert set(lp.adapter_state(model)) == keys
    lp.unmerge(model)
    assert set(lp.adapter_state(model)) == keys


def test_a_moved_state_goes_into_a_fresh_model_and_stays_part_of_its_state():
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        lp.apply(model, lp.LoRA(r=2, targets=["0"]))
        return model

    a, b = make(), make()
    a[1].weight.data.mul_(2)
    load_state(b, lp.adapter_state(a))
    assert_same_bits(bits(a), bits(b))
    b[1].weight.data.div_(2)  # the value is the initial value again
    assert "1.weight" in lp.adapter_state(b)


def test_what_a_deleted_method_trained_stays_part_of_the_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    lp.apply(model, lp.LoRA(r=2, targets=["0"], trainable=["1"]), lp.LoRA(r=2, targets=["0"], name="b"))
    lp.delete_adapter(model, "default")
    assert {"1.weight", "1.bias"} <= set(lp.adapter_state(model))


def test_packed_weights_are_not_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("qweight", torch.randint(-(2**31), 2**31, (300, 300), dtype=torch.int32))
    lp.apply(model, lp.LoRA(r=2))
    start = model._peft_injection.start
    assert start.buffers.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(lp.adapter_state(model)) == {"0.adapters.default.lora_A", "0.adapters.default.lora_B"}
    lp.reset(model)
    model.qweight[299, 299] ^= 1
    assert "qweight" in lp.adapter_state(model)
    with pytest.raises(lp.StateError, match="qweight"):
        lp.reset(model)
