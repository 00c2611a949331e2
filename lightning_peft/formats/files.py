"""The two files of an adapter directory: read with every check, written all or none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["CONFIG", "WEIGHTS", "AdapterFiles", "FormatError", "read_files", "write_files"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


class FormatError(ValueError):
    """An adapter directory that cannot be read, or an adapter that the format cannot say."""


@dataclass
class AdapterFiles:
    """What an adapter directory holds."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_files(directory: str | Path) -> AdapterFiles:
    """Read an adapter directory.

    Raises:
        FormatError: a file is missing.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FormatError(f"{directory} holds no {name}")
    with safe_open(directory / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    return AdapterFiles(directory, json.loads((directory / CONFIG).read_text()), tensors, metadata)


def write_files(
    directory: str | Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    card: str | None = None,
) -> None:
    """Write an adapter directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, directory / WEIGHTS, {"format": "pt", **metadata})
    if card is not None:
        (directory / "README.md").write_text(card)
