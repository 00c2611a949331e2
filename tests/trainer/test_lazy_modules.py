"""Lazy modules: refused without a shape, and created by a Trainer from ``example_input_array``."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.core.record import injection_state


def lazy() -> nn.Module:
    torch.manual_seed(0)
    layers = {"up": nn.Linear(4, 8), "special": nn.Linear(8, 8), "norm": nn.LazyBatchNorm1d(), "head": nn.LazyLinear(2)}
    return nn.Sequential(OrderedDict(layers))


class Lazy(pl.LightningModule):
    def __init__(self, example: Any) -> None:
        super().__init__()
        self.net = lazy()
        self.example_input_array = example

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - 1).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.1)


def fit(module: pl.LightningModule, path: Path) -> pl.Trainer:
    method = lp.LoRA(r=2, targets="special", trainable=["head"])
    trainer = pl.Trainer(max_epochs=1, callbacks=[method], logger=False, accelerator="cpu", default_root_dir=path)
    trainer.fit(module, DataLoader([torch.randn(3, 4)] * 2, batch_size=None))
    return trainer


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.BitFit(), lp.LoRA(r=2, targets="up")])
def test_without_a_shape_they_are_refused(method: lp.PEFTMethod) -> None:
    model = lazy()
    for call in (lp.inspect, lp.apply):
        with pytest.raises(lp.InjectionError, match=r"norm.weight, .*head.weight, .*have no shape yet.*Run one batch"):
            call(model, method)
    assert injection_state(model) is None
    model(torch.randn(3, 4))
    lp.apply(model, method)
    model(torch.randn(3, 4)).sum().backward()


@pytest.mark.parametrize("example", [torch.randn(3, 4), (torch.randn(3, 4),), {"x": torch.randn(3, 4)}], ids=type)
def test_a_trainer_creates_them_from_the_example_input(example: Any, tmp_path: Path) -> None:
    module = Lazy(example)
    trainer = fit(module, tmp_path)
    assert module.net.norm.num_batches_tracked == 0
    assert module.net.head.weight.requires_grad
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lp.load_from_checkpoint(Lazy, tmp_path / "a.ckpt", example=example)
    x = torch.randn(3, 4)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_an_example_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lp.InjectionError, match=r"the forward with example_input_array, .*fails: mat1 and mat2"):
        fit(Lazy(torch.randn(3, 5)), tmp_path)
    with pytest.raises(lp.InjectionError, match="set example_input_array"):
        fit(Lazy(None), tmp_path)
