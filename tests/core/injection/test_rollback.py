"""Test that a change that fails or is interrupted leaves the model unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.injection import apply as inject
from lightning_peft.core.record import injection_state
from tests.core.test_class_swap import Final, first_bases
from tests.helpers import assert_same_bits, bits


class Net(nn.Module):
    """A norm with statistics, one layer under two names, and a head in low precision."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1)
        self.head = nn.Linear(6, 2)
        self.frozen_already = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.norm(self.up(x))[:, None])[:, 0])


def everything(model: nn.Module) -> list[Any]:
    """Everything that must be restored; objects are compared by identity."""
    modules = [
        (name, type(m), sorted(vars(m)), m.training, [*m._modules.values()], [*m._forward_pre_hooks.values()])
        for name, m in model.named_modules()
    ]
    parameters = [(n, id(p), p.dtype, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()]
    return [modules, parameters]


METHODS = {
    "lora with a head": [lp.LoRA(r=2, trainable=["head"])],
    "selection": [lp.BitFit()],
    "two": [lp.LoRA(r=2, name="a"), lp.IA3(name="b", targets="all-linear")],
}


@pytest.mark.parametrize("failing", ["attach", "keep_full_precision", "freeze_norm_statistics", "fingerprint"])
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_applying_is_undone(failing: str, case: str, error: type, monkeypatch: pytest.MonkeyPatch):
    model = Net().to(torch.bfloat16)
    before, state = everything(model), bits(model)
    original = getattr(inject, failing)
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(failing)
        result = original(*args, **kwargs)
        if len(calls) == 2 or failing in ("freeze_norm_statistics", "fingerprint"):
            raise error("stopped")
        return result

    monkeypatch.setattr(inject, failing, interrupted)
    if case == "selection" and failing == "attach":
        pytest.skip("attaches nothing")
    if len(METHODS[case]) == 1 and failing == "keep_full_precision":
        calls.append("counted as the first")
    with pytest.raises(error, match="stopped"):
        lp.apply(model, *METHODS[case])
    assert everything(model) == before
    assert_same_bits(bits(model), state)
    assert injection_state(model) is None
    monkeypatch.undo()
    lp.apply(model, *METHODS[case])  # works once the fault is removed


def test_a_second_method_is_undone_and_the_first_stays(monkeypatch: pytest.MonkeyPatch):
    model = Net()
    inner = lp.apply(model.encoder, lp.LoRA(r=2, name="first"))
    before, state, table = everything(model), bits(model), str(inner)
    monkeypatch.setattr(inject, "freeze_norm_statistics", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lp.apply(model, lp.LoRA(r=2, name="second", trainable=["head"]))
    assert everything(model) == before
    assert_same_bits(bits(model), state)
    record = injection_state(model)
    assert "_peft_injection" in vars(model.encoder)
    assert list(record.methods) == ["first"]
    assert str(record.report) == table
    assert all(not part.host.startswith("encoder.") for part in record.adapter_records["first"])


@pytest.mark.parametrize("cls", first_bases(), ids=lambda cls: cls.__name__)
def test_layers_of_any_first_base_take_adapters(cls: type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), cls(6, 5), nn.Linear(5, 2)).double()
    lp.apply(model, lp.LoRA(r=2, targets="2", adapter_dtype="float64"))
    factors = {n.rpartition(".")[2]: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for factor in factors.values():
            factor.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    weight = model[2].weight + factors["lora_B"] @ factors["lora_A"] * (16 / 2)
    expected = model[3](nn.functional.linear(model[1](model[0](x)), weight, model[2].bias))
    torch.testing.assert_close(model(x), expected)
    lp.unload(model)
    assert type(model[2]) is cls


@pytest.mark.parametrize("method", [lp.LoRA(r=1, targets="inner"), lp.LoRA(r=1, targets="0", trainable=["inner"])])
def test_a_class_that_allows_no_subclass_is_refused_before_anything_changes(method: lp.PEFTMethod):
    model = nn.ModuleDict({"0": nn.Linear(2, 2), "inner": Final(2, 2), "head": nn.Linear(2, 2)})
    before = everything(model)
    for call in (lp.inspect, lp.apply):
        with pytest.raises(ValueError, match=r"LoRA 'default': 'inner' \(Final\) cannot be changed in place"):
            call(model, method)
        assert everything(model) == before
