"""The first part of a run: where it stops, what is kept of it, and what it is measured by."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

import lightning_peft as lp

__all__ = ["StopAt"]


class StopAt(Checkpoint):  # Lightning calls checkpoint callbacks last
    """Stop a fit after some of its steps, and keep a checkpoint from which it continues as if it had not stopped.

    In the middle of a run the learning rate is high and the weights are noisy, the more so the higher the rate. The
    mean of the weights over the last steps shows what a run is worth whose rate decays (arXiv:2209.14981,
    arXiv:2405.18392), and costs no training.

    Args:
        steps: optimizer steps after which the fit stops.
        path: the file of the checkpoint.
    """

    def __init__(self, steps: int, path: Path) -> None:
        self._steps, self._path = steps, path
        self._sums: list[Tensor] = []
        self._count = self._seen = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.global_step == self._seen:
            return  # gradients are accumulated
        self._seen = trainer.global_step
        if self._seen > self._steps * 3 // 4:
            values = [p.detach() for p in lp.trainable_parameters(pl_module)]
            if not self._sums:
                self._sums = [torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in values]
            for total, value in zip(self._sums, values):
                total.add_(value)
            self._count += 1
        if self._seen >= self._steps and not trainer.should_stop:
            trainer.save_checkpoint(self._path)
            trainer.should_stop = True

    def average(self, module: L.LightningModule) -> None:
        """Set the trainable parameters to their mean over the last quarter of the steps."""
        with torch.no_grad():
            for parameter, total in zip(lp.trainable_parameters(module), self._sums):
                parameter.copy_(total / self._count)
