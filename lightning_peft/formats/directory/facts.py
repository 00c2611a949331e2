"""This package's facts about an adapter, in the metadata of its tensor file. PEFT ignores them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.core.untrusted import FormatError, parse_json

__all__ = ["METADATA", "base_facts"]

#: the key of the facts in the metadata
METADATA = "lightning_peft"


def base_facts(metadata: Mapping[str, str], where: str | Path) -> dict[str, Any]:
    """The facts that this package wrote into the metadata; empty for files written by PEFT.

    Args:
        metadata: The metadata of the tensor file.
        where: The name of that file, for errors.

    Raises:
        FormatError: if the facts do not have the form that :func:`lightning_peft.save_adapter` writes.
    """
    what = f"the metadata {METADATA!r} of {where}"
    facts = parse_json(metadata.get(METADATA, "{}").encode(), what)
    values = facts.get("fingerprint", {}).get("values", {}) if isinstance(facts.get("fingerprint", {}), dict) else None
    numbers = isinstance(values, dict) and all(
        isinstance(sample, list) and all(isinstance(v, int | float) for v in sample) for sample in values.values()
    )
    if not numbers or not all(isinstance(facts.get(key, {}), dict) for key in ("config", "metrics")):
        raise FormatError(f"{what} is not in the form that this package writes: it was edited. Use another copy")
    return facts
