"""The work of each operation does not grow with the number of adapters that are loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp

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
