"""Make Lightning's weight averaging (EMA) callbacks average the trainable state only.

Averaging the frozen base too would cost a second copy of it in memory and in every checkpoint. It would also change the
base, because a moving average of equal values is equal to them only up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_peft.core.class_swap import add_mixin, has_mixin, original_class
from lightning_peft.core.names import canonical
from lightning_peft.core.record import injection_state
from lightning_peft.trainer.packages import lightning_classes

__all__ = ["TrainableAveraging", "adapt_averaging", "start_averaging"]


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback, WeightAveraging
else:
    WeightAveraging = object  # the user's callback may come from lightning or pytorch_lightning


class TrainableAveraging(WeightAveraging):
    """Mixin of a ``WeightAveraging`` callback."""

    @property
    def state_key(self) -> str:
        return original_class(self).__qualname__  # checkpoints keep the key that they have without methods

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass  # too early: adapters do not exist yet. See start

    def start(self, module: L.LightningModule) -> None:
        """Start the average with the module's trainable state."""
        device = self._device or module.device
        self._average_model = _Average(_Trainable(module), device, use_buffers=self._use_buffers, **self._kwargs)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            checkpoint["state_dict"] = {**state, **_renamed(checkpoint["state_dict"], "/", ".")}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = _renamed(checkpoint["state_dict"], ".", "/")
        if self._average_model is not None:
            state = {k: v for k, v in state.items() if k in self._average_model.module.state_dict()}
        super().on_load_checkpoint(trainer, pl_module, {**checkpoint, "state_dict": state})

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(_Trainable(pl_module))  # type: ignore[arg-type]

    def _copy_average_to_current(self, pl_module: L.LightningModule) -> None:
        super()._copy_average_to_current(_Trainable(pl_module))  # type: ignore[arg-type]


class _Trainable(nn.Module):
    """A flat view of a model's trainable parameters and of the buffers that training updates; it copies nothing.

    Names contain ``/`` instead of ``.``, which torch does not allow in the name of a registered parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(canonical(name).replace(".", "/"), parameter)
        record = injection_state(model)
        if record is not None and any(method.train_norm_stats for method in record.methods.values()):
            for name, buffer in model.named_buffers():
                if name in record.start.buffers:
                    self.register_buffer(canonical(name).replace(".", "/"), buffer)


class _Average(AveragedModel):
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(_Trainable(model))


def _renamed(state: Mapping[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): value for name, value in state.items()}


def adapt_averaging(callbacks: list[Callback]) -> None:
    """Adapt all weight averaging callbacks, at any position in the list, to modules with adapters."""
    for callback in callbacks:
        if isinstance(callback, lightning_classes("callbacks.WeightAveraging")):
            add_mixin(callback, TrainableAveraging)
            callback._average_model = None


def start_averaging(trainer: Any, module: L.LightningModule) -> None:
    """Start the averages of a fit. Call this after injection and before a checkpoint is restored."""
    if trainer is not None and trainer.state.fn == "fit":
        for callback in trainer.callbacks:
            if has_mixin(callback, TrainableAveraging) and callback._average_model is None:
                callback.start(module)
