"""Check the types of PEFT's options that name modules, layers, ranks or tokens, before any of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_peft.core.untrusted import FormatError

__all__ = ["check_types"]

_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_LISTS = ("modules_to_save", "target_parameters")


def check_types(config: Mapping[str, Any]) -> None:
    """Refuse options whose values have a type that PEFT never writes.

    Raises:
        FormatError: if an option has another type; the message names the option and the expected type.
    """
    for option in (*_NAMES, *_LISTS):
        value = config.get(option)
        if value is not None and not (isinstance(value, str) and option in _NAMES) and not _is_list(value, str):
            raise FormatError(f"{option} must be a list of names, got {value!r}")
    if not isinstance(config.get("task_type"), str | None):
        raise FormatError(f"task_type must be a string or null, got {config['task_type']!r}")
    layers = config.get("layers_to_transform")
    if layers is not None and not _is_list(layers if isinstance(layers, list) else [layers], int):
        raise FormatError(f"layers_to_transform must be a layer index or a list of them, got {layers!r}")
    masks = config.get("rank_pattern") if config.get("peft_type") == "ADALORA" else None
    if masks is not None and not (isinstance(masks, dict) and all(_is_mask(mask) for mask in masks.values())):
        raise FormatError("rank_pattern of AdaLoRA must map names to lists of true and false, one for each rank")
    for option, kinds in (("rank_pattern", int), ("alpha_pattern", (int, float))):
        patterns = config.get(option)
        if patterns is None or patterns is masks:
            continue
        if not isinstance(patterns, dict) or not _is_list(list(patterns.values()), kinds):
            raise FormatError(f"{option} must map patterns to numbers, got {patterns!r}")
    tokens = config.get("trainable_token_indices")
    if tokens is not None:
        rows = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
        if not all(_is_list(row, int) for row in rows):
            raise FormatError(
                f"trainable_token_indices must be token ids, as a list or as lists by name, got {tokens!r}"
            )


def _is_list(value: Any, kinds: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, bool) for v in value)
