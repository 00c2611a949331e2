"""A module that the user compiled before the fit: it trains as an uncompiled one, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_peft as lp
from tests.helpers import close

from .toys import Toy, loader, lora, trainer, val_loader


class Quiet(Toy):
    """Logs nothing, which torch cannot compile."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


# Without LoRA's dropout, which draws other random numbers when it is compiled.
def test_a_compiled_module_trains_as_an_uncompiled_one(tmp_path: Path) -> None:
    states = []
    for compiled in (False, True):
        torch._dynamo.reset()
        L.seed_everything(1, verbose=False)
        module, run = Quiet(), trainer(tmp_path, method=lora(dropout=0.0), enable_checkpointing=False)
        run.fit(torch.compile(module, backend="eager") if compiled else module, loader())
        states.append(lp.adapter_state(module))
        path = tmp_path / f"{compiled}.ckpt"
        run.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert states[-1].keys() <= saved.keys()
        assert not [key for key in saved if "_orig_mod" in key]
        x = torch.randn(4, 16)
        assert torch.equal(module.eval()(x), lp.load_from_checkpoint(Quiet, path).eval()(x))
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        close(value, states[1][key], 1e-6)


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
def test_a_part_that_is_already_compiled_is_refused(how: str, tmp_path: Path) -> None:
    module = Toy()
    if how == "compile":
        module.body.compile(backend="eager")
    else:
        module.body = torch.compile(module.body, backend="eager")
    with pytest.raises(lp.InjectionError, match=r"body is already compiled, .*apply methods first"):
        trainer(tmp_path).fit(module, loader(), val_loader())
