"""The modules that the tests serve; the server's own process imports them from here."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.serving.server import Served
from tests.helpers import perturb


class Regressor(L.LightningModule):
    """A small network, from a fixed seed, that predicts two numbers from four."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


def build() -> Served:
    return Served(Regressor())


def save_adapters(folder: Path, names: dict[str, lp.PEFTMethod], make=Regressor) -> dict[str, L.LightningModule]:
    """Save an adapter under each name, and return the models that they were saved from."""
    models = {}
    for seed, (name, method) in enumerate(names.items()):
        models[name] = make()
        lp.apply(models[name], method)
        perturb(models[name], seed=seed, scale=0.5)
        lp.save_adapter(models[name], folder / name)
    return models
