"""Support modules that already have trainable adapters, without a method among the Trainer's callbacks.

A module may load an adapter or apply a method to a submodule (``lp.load_adapter(self.net, ..., trainable=True)``) in
``__init__``, ``setup`` or ``configure_model``, or hold a network that was adapted before. The submodule has no
reference to the LightningModule around it, so a callback must look for it. Lightning gets this callback from the entry
point ``lightning.pytorch.callbacks_factory`` whenever a Trainer is created. It has no effect unless the module of the
run has trainable adapters.
"""

from __future__ import annotations

import weakref
from importlib.metadata import entry_points
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.core.injection.apply import after_injection
from lightning_peft.core.injection.widen_record import widen_record
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.state_dict import fix_trained
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.trainer.module import adapt_module
from lightning_peft.trainer.prepare_run import prepare_run

__all__ = ["FindAdapters", "adapt_around", "callbacks", "is_registered"]

GROUPS = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")

_trainers: weakref.WeakSet[Any] = weakref.WeakSet()


def callbacks() -> list[Callback]:
    """The callbacks that Lightning adds to every Trainer; see the docstring of this file."""
    return [FindAdapters()]


def is_registered() -> bool:
    """Whether Lightning finds :func:`callbacks`. It does not if the package is on the path but not installed."""
    return any(point.value == f"{__name__}:callbacks" for group in GROUPS for point in entry_points(group=group))


class FindAdapters(Callback):
    """Prepares a run whose module already has trainable adapters, as an attached method would."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _trainers.add(trainer)  # the module's own setup and configure_model run later, and may load adapters too
        _prepare(trainer)


def adapt_around(module: L.LightningModule) -> None:
    """Make a LightningModule write trimmed checkpoints that include trained parameters outside its adapted submodule.

    Raises:
        MisconfigurationException: if two submodules were adapted separately.
    """
    parts = [name for name, part in base_modules(module) if "_peft_injection" in vars(part)]
    if len(parts) > 1:
        raise MisconfigurationException(
            f"{parts[0]!r} and {parts[1]!r} of {type(module).__name__} were adapted separately, but a checkpoint has "
            "only one list of methods: apply the methods to the LightningModule itself, or load the adapters onto it, "
            "each under its own name"
        )
    widen_record(module, freeze=False)
    adapt_module(module)
    fix_trained(module)


def _prepare(trainer: Any) -> None:
    module = trainer.lightning_module
    record = injection_state(module)
    if any(hasattr(c, "plan") for c in trainer.callbacks) or record is None or not any(record.trained_base.values()):
        return
    adapt_around(module)
    prepare_run(trainer, module)


def _injected(model: nn.Module) -> None:
    """Prepare the running Trainer whose module contains ``model``; called after every injection."""
    for trainer in list(_trainers):
        module = trainer.lightning_module if trainer.state.status == "running" else None
        if module is not None and any(part is model for _, part in base_modules(module)):
            _prepare(trainer)


after_injection.append(_injected)
