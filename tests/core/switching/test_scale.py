"""The work of each operation does not grow with the number of adapters that are loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.core.switching.row_dispatcher import RowDispatcher
from lightning_peft.methods.lora import LoRAAdapter
from tests.helpers import close, perturb, trained_parameters

FEW, MANY = 3, 33


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))


def calls(operation: Any) -> int:
    """The number of Python and C functions that ``operation`` calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return count


def work(model: nn.Module, folder: Path) -> dict[str, int]:
    def enter_rows() -> None:
        with lp.rows(model, ["a1", None, "a0"]):
            model(torch.ones(3, 4))

    def enter_active() -> None:
        with lp.active(model, "a1"):
            pass

    operations = {
        "apply": lambda: lp.apply(model, lp.LoRA(r=1, targets=["0"], name="new")),
        "load": lambda: lp.load_adapter(model, folder, name="read"),
        "switch": lambda: lp.set_active(model, "a1"),
        "active": enter_active,
        "rows": enter_rows,
        "merge": lambda: lp.merge(model, "a0"),
        "unmerge": lambda: lp.unmerge(model),
        "delete": lambda: lp.delete_adapter(model, "new"),
        "delete what was loaded": lambda: lp.delete_adapter(model, "read"),
    }
    return {name: calls(operation) for name, operation in operations.items()}


@pytest.mark.parametrize("active", [True, False], ids=["all active", "one active"])
def test_operations_do_not_depend_on_the_number_of_adapters(tmp_path: Path, active: bool) -> None:
    source, model = net(), net()
    lp.apply(source, lp.LoRA(r=1, targets=["0"]))
    lp.save_adapter(source, tmp_path / "saved")
    found: list[dict[str, int]] = []
    for new in (range(FEW), (), range(FEW, MANY)):  # the first round fills caches
        for i in new:
            lp.apply(model, lp.LoRA(r=1, targets=["0"], name=f"a{i}"))
        if not active:
            lp.set_active(model, "a0")
        with torch.no_grad():
            found.append(work(model, tmp_path / "saved"))
    _, few, many = found
    # A few calls for each adapter are allowed, but none for each adapter on each of the modules.
    assert {name: n for name, n in many.items() if n > few[name] + 2 * (MANY - FEW)} == {}


def test_a_new_context_with_the_same_rows_makes_no_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept; values are read again, also those written through ``.data``, which no version counter sees."""
    model, x, rows = net(), torch.randn(3, 4), ["a", None, "b"]
    lp.apply(model, *(lp.LoRA(r=2, targets=["0"], name=name) for name in "abc"))
    perturb(model).requires_grad_(False)
    plan, planned = RowDispatcher._plan, []
    monkeypatch.setattr(RowDispatcher, "_plan", lambda self, *args: planned.append(1) or plan(self, *args))

    def check(rows: list[str | None]) -> int:
        planned.clear()
        with torch.no_grad():
            with lp.rows(model, rows):
                together = [model(x) for _ in range(3)]
            alone = []
            for name, row in zip(rows, x):
                with lp.active(model, *([] if name is None else [name])):
                    alone.append(model(row[None]))
        for output in together:
            close(output, torch.cat(alone))
        return len(planned)

    assert [check(rows), check(rows)] == [3, 0]
    for name, parameter in model.named_parameters():
        if ".a.lora_B" in name:
            parameter.data.copy_(torch.ones_like(parameter))
    assert check(rows) == 0
    assert [check(["a", "a", "b"]), check(["b", "a", "b"]), check(rows)] == [3, 3, 0]
    lp.delete_adapter(model, "c")
    assert check(rows) == 3


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)], ids=["equal ranks", "different ranks"])
def test_factors_are_read_once_for_each_adapter(monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...]) -> None:
    model, x = net(), torch.randn(6, 4)
    lp.apply(model, *(lp.LoRA(r=r, alpha=r + 1, targets=["0"], name=name) for name, r in zip("abc", ranks)))
    perturb(model)
    factors, read = LoRAAdapter.factors, []
    monkeypatch.setattr(LoRAAdapter, "factors", lambda self: read.append(self) or factors(self))
    rows = ["a", "b", "a", "c", "a", "b"]
    with lp.rows(model, rows):
        together = model(x)
    assert len(read) == 3 * 3  # three adapters on three layers
    together.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in trained_parameters(model).items()}
    model.zero_grad()
    for name, row in zip(rows, x):
        with lp.active(model, name):
            model(row[None]).square().sum().backward()
    for name, p in trained_parameters(model).items():
        close(grads[name], p.grad)
