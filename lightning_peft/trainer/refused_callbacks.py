"""Refuse callbacks of Lightning that change the base in ways that a checkpoint of trainable state cannot hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_peft.trainer.packages import lightning_classes

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["refuse_callbacks"]

#: class in Lightning's callbacks -> why it does not work with methods, and what to do instead
_REFUSED = {
    "StochasticWeightAveraging": "it copies the model before the adapters are injected, and resets the statistics of "
    "frozen norm layers. Use lightning.pytorch.callbacks.WeightAveraging or EMAWeightAveraging",
    "BaseFinetuning": "it freezes modules before the adapters are injected, so methods would skip them, and later "
    "trains the base itself. Use lp.GradualUnfreezing to unfreeze the base block by block, or name the modules that "
    "train in full in trainable",
    "ModelPruning": "it changes frozen weights of the base, and puts the whole model into every checkpoint. Prune the "
    "base before the fit, or the model that lp.unload(model, merge=True) returns",
}


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that do not work with methods, at any position in the list.

    Raises:
        MisconfigurationException: if there is one; the message says why, and what to use instead.
    """
    for callback in callbacks:
        for name, why in _REFUSED.items():
            if isinstance(callback, lightning_classes(f"callbacks.{name}")):
                raise MisconfigurationException(f"{type(callback).__name__} is not supported with PEFT methods: {why}")
