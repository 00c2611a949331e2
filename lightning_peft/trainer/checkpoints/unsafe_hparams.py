"""Keep a checkpoint readable whatever its hyperparameters are.

``torch.load(weights_only=True)`` refuses a whole file because of one object in it. Hyperparameters that it refuses
are written as pickles of their own, which are bytes to it; only ``weights_only=False`` reads them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["pickle_unsafe_hparams", "restore_unsafe_hparams", "unread_hparams", "unreadable"]

UNSAFE_HPARAMS = "lightning_peft_apart"
_SETS = {"hyper_parameters": "hparams_type", "datamodule_hyper_parameters": "datamodule_hparams_type"}


def unreadable(value: Any) -> str | None:
    """Why ``torch.load(weights_only=True)`` would refuse ``value``, in torch's words; None if it reads it."""
    try:
        torch.load(io.BytesIO(_pickled(value)), weights_only=True)
    except Exception as error:  # an object can make pickling raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else repr(error))
    return None


def pickle_unsafe_hparams(checkpoint: dict[str, Any]) -> None:
    """Move the hyperparameters that ``weights_only=True`` refuses out of the others, each as a pickle of its own."""
    apart: dict[str, dict[str, bytes]] = {}
    for key, kind in _SETS.items():
        values = checkpoint.get(key)
        if values is None or (kind not in checkpoint and unreadable(values) is None):
            continue
        if checkpoint.pop(kind, None) is not None:  # OmegaConf's containers
            from omegaconf import OmegaConf

            values = OmegaConf.to_container(values)
        refused = {name for name, value in values.items() if unreadable(value) is not None}
        checkpoint[key] = {name: value for name, value in values.items() if name not in refused}
        apart[key] = {name: _pickled(values[name]) for name in refused}
    if any(apart.values()):
        checkpoint[UNSAFE_HPARAMS] = apart


def restore_unsafe_hparams(checkpoint: dict[str, Any]) -> None:
    """Undo :func:`pickle_unsafe_hparams`, which runs the code that the pickles name."""
    for key, values in checkpoint.pop(UNSAFE_HPARAMS, {}).items():
        read = {name: torch.load(io.BytesIO(value), weights_only=False) for name, value in values.items()}
        checkpoint[key] = {**checkpoint.get(key, {}), **read}


def unread_hparams(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the module's hyperparameters that were not read."""
    return sorted((checkpoint.get(UNSAFE_HPARAMS) or {}).get("hyper_parameters", {}))


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
