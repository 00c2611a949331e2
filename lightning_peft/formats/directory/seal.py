"""Digests that are saved in an adapter directory and compared when it is read.

They are in the metadata of the tensor file, which PEFT ignores. Files without digests (PEFT's own and those of earlier
releases) load without this check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_peft.core.state.digest import difference, tensor_digests, value_digest
from lightning_peft.core.untrusted import FormatError, parse_json

__all__ = ["check_options", "check_tensors", "seal"]

KEY = "lightning_peft_digests"
#: options about an adapter's origin, which do not change its output and may therefore be edited
_FREE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "reason"}


def seal(config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with digests of the tensors, the options and itself; replaces existing digests."""
    metadata = {key: value for key, value in metadata.items() if key != KEY}
    digests = {"tensors": tensor_digests(tensors), "options": _options(config), "metadata": value_digest(metadata)}
    return {**metadata, KEY: json.dumps(digests)}


def check_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> None:
    """Compare an adapter's tensors and metadata with their digests, if there are any.

    Raises:
        FormatError: if one has changed since it was saved; the message names the first such tensor.
    """
    if (saved := _saved(metadata, where)) is not None:
        rest = {key: value for key, value in metadata.items() if key != KEY}
        _compare("the tensor", difference(saved.get("tensors"), tensor_digests(tensors)), where)
        _compare("its metadata", None if saved.get("metadata") == value_digest(rest) else "has changed", where)


def check_options(config: Mapping[str, Any], metadata: Mapping[str, str], where: str) -> None:
    """Compare an adapter's options with their digests.

    This runs after all other checks, whose messages are more specific, and finds changes that no other check sees.

    Raises:
        FormatError: if an option has changed since it was saved; the message names the first one.
    """
    if (saved := _saved(metadata, where)) is not None:
        options, known = saved.get("options"), _options(config)
        if isinstance(options, dict):  # an added option may change the output too, unless its value is empty
            known = {k: v for k, v in known.items() if k in options or config[k] not in (None, [], {}, "")}
        _compare("the option", difference(options, known), where)


def _saved(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    return parse_json(metadata[KEY].encode(), f"the metadata {KEY!r} of {where}") if KEY in metadata else None


def _compare(what: str, wrong: str | None, where: str) -> None:
    if wrong is not None:
        raise FormatError(
            f"{where} has changed since it was saved: {what} {wrong}. The files are damaged, or were edited or "
            f"mixed with the files of another adapter: use another copy of the directory, or save the adapter again"
        )


def _options(config: Mapping[str, Any]) -> dict[str, str]:
    return {option: value_digest(value) for option, value in config.items() if option not in _FREE}
