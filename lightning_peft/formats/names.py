"""What PEFT's keys start with; how names map between a model and its base is in :mod:`lightning_peft.core.base`."""

from __future__ import annotations

from lightning_peft.core.base import Base, base_for_keys, base_of

__all__ = ["PREFIX", "Base", "base_for_keys", "base_of"]

#: what every key of PEFT's that belongs to a module starts with
PREFIX = "base_model.model."
