"""Keep a checkpoint readable with ``weights_only=True``, whatever objects its hyperparameters hold.

``torch.load(weights_only=True)`` refuses a whole file if one object in it is unsafe. Each hyperparameter that it would
refuse is therefore stored as ``bytes`` that hold a separate pickle. Only ``weights_only=False`` reads those.
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
    """Why ``torch.load(weights_only=True)`` would refuse ``value``, as torch's message says; None if it loads."""
    try:
        return _refusal(_pickled(value))
    except Exception as error:  # an object's __reduce__ can raise any exception
        return _reason(error)


def pickle_unsafe_hparams(checkpoint: dict[str, Any]) -> None:
    """Replace each hyperparameter that ``weights_only=True`` refuses by a separate pickle; changes ``checkpoint``."""
    apart: dict[str, dict[str, bytes]] = {}
    for key, kind in _SETS.items():
        values = checkpoint.get(key)
        if values is None:
            continue
        if checkpoint.pop(kind, None) is not None:  # Lightning stores this key for OmegaConf containers only
            from omegaconf import OmegaConf

            values = OmegaConf.to_container(values)
        pickled = {name: _pickled(value) for name, value in values.items()}
        apart[key] = {name: data for name, data in pickled.items() if _refusal(data) is not None}
        checkpoint[key] = {name: value for name, value in values.items() if name not in apart[key]}
    if any(apart.values()):
        checkpoint[UNSAFE_HPARAMS] = apart


def _refusal(pickled: bytes) -> str | None:
    try:
        torch.load(io.BytesIO(pickled), weights_only=True)
    except Exception as error:  # whatever torch or the object raises
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else repr(error))


def restore_unsafe_hparams(checkpoint: dict[str, Any]) -> None:
    """Undo :func:`pickle_unsafe_hparams`. This runs any code that the pickles name: for trusted files only."""
    for key, values in checkpoint.pop(UNSAFE_HPARAMS, {}).items():
        read = {name: torch.load(io.BytesIO(value), weights_only=False) for name, value in values.items()}
        checkpoint[key] = {**checkpoint.get(key, {}), **read}


def unread_hparams(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the module's hyperparameters that are still pickled, because they were not read."""
    return sorted((checkpoint.get(UNSAFE_HPARAMS) or {}).get("hyper_parameters", {}))


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
