"""Mixed batches with several entries per row, and how factors are stacked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.core.switching.test_rows import two_loras
from tests.helpers import close, differ


@torch.no_grad()
def test_several_entries_to_a_row_and_windows():
    model, x = two_loras(), torch.randn(6, 4, 6)
    with lp.rows(model, ["a", "a", None, None, "b", "b"]):
        want = model(x)
    with lp.rows(model, ["a", None, "b"], repeats=2):
        close(model(x), want)
        model(x[::2])  # the size that an encoder sees before the rows are repeated
    windows = Windows(model)
    with lp.rows(windows, ["a", None, "b"]):
        close(windows(x.reshape(3, 8, 6)), want)


class Windows(nn.Module):
    """Calls a module with two entries for each row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(2 * len(x), -1, x.shape[-1]))

    def step(self, x: Tensor) -> Tensor:
        """Holds the network, as a LightningModule does, and is never called itself."""
        return self.inner(x)


@torch.no_grad()
def test_the_batch_has_one_entry_for_each_name():
    model, x = Windows(two_loras()), torch.randn(4, 6)
    for run in (model.inner, model.step):
        with lp.rows(model, ["a", "b"]), pytest.raises(lp.RowError, match=r"batch of 4 .* 2 names: .*repeats=2 if"):
            run(x)
        with lp.rows(model, ["a", "a"], repeats=4), pytest.raises(lp.RowError, match="repeats=4: it must be 2 or 8"):
            run(x)
        with lp.rows(model, ["a", "b"], repeats=2):
            with pytest.raises(lp.RowError, match="it must be 2 or 4"):
                run(x[:3])
            run(x)  # after an error, batches are still checked, and a correct one is accepted
            with pytest.raises(lp.RowError, match="it must be 2 or 4"):
                run(x[:1])
    with pytest.raises(lp.RowError, match="repeats is the number of entries"), lp.rows(model, ["a"], repeats=0):
        pass


@torch.no_grad()
def test_factors_are_stacked_once_and_follow_changes():
    model, x = two_loras().requires_grad_(False), torch.randn(2, 6)  # factors of trained adapters are never kept
    adapter = model.up.adapters["a"]
    calls = []
    original = type(adapter).factors
    adapter.factors = lambda: calls.append(1) or original(adapter)
    with lp.rows(model, ["a", "b"]):
        model(x)
        first = model(x)
        assert len(calls) == 1
        adapter.lora_B.add_(1.0)
        differ(model(x), first)
    assert len(calls) == 2
