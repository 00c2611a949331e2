"""Small modules, data and trainers for the tests of ``trainer/``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightning_peft as lp

torch.set_num_threads(1)


class Toy(L.LightningModule):
    """A small classifier with a norm layer and dropout; ``where`` names the hook that builds it."""

    def __init__(self, where: str = "init", width: int = 16, base_seed: int = 7, lr: float = 1e-2, batch_size: int = 8):
        super().__init__()
        self.save_hyperparameters()
        if where == "init":
            self.build()

    def build(self) -> None:
        if hasattr(self, "body"):
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams.base_seed)
            w = self.hparams.width
            self.body = nn.Sequential(
                nn.Linear(16, w), nn.BatchNorm1d(w), nn.ReLU(), nn.Dropout(0.1), nn.Linear(w, w), nn.ReLU()
            )
            self.head = nn.Linear(w, 2)

    def setup(self, stage: str) -> None:
        if self.hparams.where == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.hparams.where == "configure_model":
            self.build()
        if self.hparams.where == "apply":
            self.build()
            lp.apply(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict | list) and not isinstance(
            batch[next(iter(batch))] if isinstance(batch, dict) else batch[0], Tensor
        ):
            parts = batch.values() if isinstance(batch, dict) else batch
            return torch.stack([self.loss(part) for part in parts]).mean()
        x, y = batch
        return nn.functional.cross_entropy(self(x.to(self.dtype)), y)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0].to(self.dtype))

    def train_dataloader(self) -> DataLoader:
        return loader(batch_size=self.hparams.batch_size)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plain(nn.Module):
    """User-defined layers, for modules that need another architecture."""


def data(n: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


class Noisy(Dataset):
    """Random augmentation in ``__getitem__``, with torch's and numpy's RNGs."""

    def __init__(self, n: int = 40) -> None:
        self.x, self.y = data(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(16) + float(np.random.rand()), self.y[i]  # noqa: NPY002


class Stream(IterableDataset):
    """A dataset without length that shuffles through a small random buffer and adds noise."""

    def __iter__(self) -> Any:
        x, y = data()
        buffer: list[int] = []
        for i in [*range(40), None, None, None, None]:
            if i is not None:
                buffer.append(i)
            if buffer and (len(buffer) > 4 or i is None):
                j = buffer.pop(int(torch.randint(len(buffer), ())))
                yield x[j] + 0.1 * torch.randn(16), y[j]


def loader(dataset: Any = None, batch_size: int = 8, **options: Any) -> DataLoader:
    dataset = dataset if dataset is not None else TensorDataset(*data())
    shuffle = {} if isinstance(dataset, IterableDataset) or "sampler" in options else {"shuffle": True}
    return DataLoader(dataset, batch_size=batch_size, **shuffle, **options)


def val_loader() -> DataLoader:
    return DataLoader(TensorDataset(*data(16)), batch_size=8)


def lora(**options: Any) -> lp.LoRA:
    return lp.LoRA(**{"r": 4, "dropout": 0.1, "trainable": ["head"], **options})


def trainer(root: Path | str, *callbacks: Any, method: Any = None, **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU with a LoRA attached."""
    methods = [method if method is not None else lora()] if method is not False else []
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(
            default_root_dir=str(root), callbacks=[*methods, *callbacks], **{**defaults, **quiet, **options}
        )


def every_step(root: Path) -> list[ModelCheckpoint]:
    """Save a checkpoint after every optimizer step and at the end of every epoch."""
    steps = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(root, filename="end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    return [steps, epochs]


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def state_of(module: L.LightningModule, run: L.Trainer) -> dict[str, Any]:
    """Everything that a resumed run must have in common with one that never stopped."""
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "trains": [n for n, p in module.named_parameters() if p.requires_grad],
        "optimizers": [o.state_dict() for o in run.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in run.lr_scheduler_configs],
        "step": run.global_step,
    }
