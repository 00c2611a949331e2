"""In a bfloat16 base no method casts activations to float32; only modules that train in full use float32."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_peft as lp
from benchmarks.faults import kind_of
from tests.kinds import KINDS
from tests.strategies import ROWS
from tests.table import METHODS

#: these train whole modules, which stay in float32 and cast what they are called with
IN_FULL = {"LinearProbe", "LastLayers", "GradualUnfreezing", "NormTuning"}


class CastsUp(TorchDispatchMode):
    """Counts the shapes of tensors that are cast from bfloat16 to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[tuple[int, ...]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and (args[0].dtype, out.dtype) == (
            torch.bfloat16,
            torch.float,
        ):
            self.seen[tuple(out.shape)] += 1
        return out


@pytest.mark.parametrize("method", ROWS)
def test_no_activation_is_cast_up(method: str) -> None:
    kind, found = KINDS[kind_of(ROWS[method])], []
    batch = [x.bfloat16() if x.is_floating_point() else x for x in kind.batch()]
    for apply in (False, True):
        model = kind.build()
        if apply:
            lp.apply(model, METHODS[ROWS[method]].make(kind))
        model.bfloat16()
        with CastsUp() as casts:
            output = model(*batch)
        assert output.dtype == torch.bfloat16
        found.append(casts.seen)
    weights = {tuple(p.shape) for p in model.parameters()}  # DoRA computes the norm of a weight in float32
    assert any(shape not in weights for shape in found[1] - found[0]) == (method in IN_FULL)
