"""Prepare a Trainer and a module for the attached methods."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_peft.trainer.averaging import adapt_averaging
from lightning_peft.trainer.bitsandbytes_precision import defer_class_replacement
from lightning_peft.trainer.lifecycle import Lifecycle
from lightning_peft.trainer.logs.monitor import AdapterMonitor
from lightning_peft.trainer.module import adapt_module
from lightning_peft.trainer.packages import check_packages
from lightning_peft.trainer.refused_callbacks import refuse_callbacks
from lightning_peft.trainer.strategy import adapt_strategy

__all__ = ["prepare_run"]


def prepare_run(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Prepare trainer and module for the methods among the trainer's callbacks; idempotent.

    Raises:
        MisconfigurationException: if a callback or the strategy does not support adapters, or if the run mixes both of
            Lightning's packages.
    """
    check_packages(trainer, module)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    refuse_callbacks(callbacks)
    methods = [i for i, c in enumerate(callbacks) if hasattr(c, "plan") and hasattr(c, "resume_may_differ")]
    there = [c for c in callbacks if isinstance(c, Lifecycle)]
    if not there:
        there = [Lifecycle()]
        callbacks.insert(methods[0] + 1 if methods else len(callbacks), there[0])
    if trainer.loggers and not any(isinstance(c, AdapterMonitor) for c in callbacks):
        monitor = AdapterMonitor()
        monitor.added_by_default = True
        callbacks.insert(callbacks.index(there[0]) + 1, monitor)
    adapt_averaging(callbacks)
    adapt_module(module)
    defer_class_replacement(trainer)
    adapt_strategy(trainer, there[0]._loaders)
