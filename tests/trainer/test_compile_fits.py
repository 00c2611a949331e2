"""A fit whose network is compiled, for every method: one graph for training, one for validation, the eager result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_peft as lp
from benchmarks.faults import Module, inside_net, kind_of
from tests.helpers import close
from tests.kinds import KINDS
from tests.strategies import REMARKS, ROWS
from tests.table import METHODS
from tests.trainer.toys import trainer


class Compiled(Module):
    """The module of the fault tests, whose network is compiled when the fit starts if there is a backend."""

    backend: Any = None

    def on_fit_start(self) -> None:
        if self.backend is not None:
            self.net = torch.compile(self.net, backend=self.backend, fullgraph=True)


def unfreeze_by_name() -> lp.PEFTMethod:
    return lp.GradualUnfreezing(targets=["net.up", "net.mid", "net.down"], trainable=["head"])


@pytest.mark.parametrize("method", [*ROWS, "targets"])
def test_a_compiled_fit_equals_an_eager_one(method: str, tmp_path: Path) -> None:
    row, states = ROWS.get(method), []
    kind = kind_of(row) if row is not None else "linear"
    counter = CompileCounterWithBackend("eager")
    for backend in (None, counter):
        torch.compiler.reset()
        L.seed_everything(3, verbose=False)
        module = Compiled(kind)
        module.backend = backend
        made = METHODS[row].make(inside_net(KINDS[kind])) if row is not None else unfreeze_by_name()
        run = trainer(tmp_path, method=made, max_epochs=2, enable_checkpointing=False)
        run.fit(module)
        states.append(lp.adapter_state(module))
    assert counter.frame_count == (4 if (type(made).__name__, "compile") in REMARKS else 2)
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert states[0].keys() == states[1].keys() == saved.keys()
    for key, value in states[0].items():
        close(states[1][key], value)
        assert torch.equal(saved[key], states[1][key])
    torch.compiler.reset()
