"""Every method trains, saves and resumes under every precision; what trains is float32, or float64 in a float64 run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest

from benchmarks.faults import Module, inside_net, kind_of
from tests.kinds import KINDS
from tests.strategies import PRECISIONS, ROWS, WARNED, precision, trained_dtype
from tests.table import METHODS
from tests.trainer.toys import same, trainer


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("method", ROWS)
def test_trains_and_reloads(tmp_path: Path, method: str, name: str) -> None:
    kind = kind_of(ROWS[method])

    def fit(ckpt: Path | None = None) -> tuple[Module, L.Trainer]:
        module, made = Module(kind), METHODS[ROWS[method]].make(inside_net(KINDS[kind]))
        quick = {"max_steps": 2, "limit_val_batches": 0, "enable_checkpointing": False}
        run = trainer(tmp_path, method=made, **quick, **precision(name))
        run.fit(module, ckpt_path=ckpt)
        return module, run

    if (method, name) in WARNED:
        with pytest.warns(UserWarning, match="where small updates are rounded away"):
            fit()
        return
    module, run = fit()
    started = dict(Module(kind).named_parameters())
    trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {trained_dtype(method, name)}
    assert all(p.isfinite().all() for p in trained.values())
    assert any(n not in started or not same(p.double(), started[n].detach().double()) for n, p in trained.items())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again, resumed = fit(tmp_path / "x.ckpt")
    assert resumed.global_step == 2
    assert same(dict(again.state_dict()), dict(module.state_dict()))
