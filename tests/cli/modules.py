"""A user's module and data, and the user's own LightningCLI script, as the command line finds them on the path."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp  # noqa: F401 - the script's callbacks are named by their class alone


class Module(L.LightningModule):
    def __init__(self, width: int = 16, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
        self.head = nn.Linear(width, 2)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the pretrained weights of this module
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Data(L.LightningDataModule):
    def __init__(self, width: int = 16, batch_size: int = 8) -> None:
        super().__init__()
        x = torch.randn(32, width, generator=torch.Generator().manual_seed(1))
        self.rows = TensorDataset(x, (x[:, 0] > 0).long())
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=self.batch_size)

    test_dataloader = val_dataloader


if __name__ == "__main__":
    LightningCLI(Module, Data, save_config_kwargs={"overwrite": True})
