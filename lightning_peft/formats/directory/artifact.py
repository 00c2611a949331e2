"""Adapter directories that are W&B artifacts: ``wandb:entity/project/name:v3``."""

from __future__ import annotations

from pathlib import Path

from lightning_peft.core.untrusted import FormatError

__all__ = ["local_directory"]

_SCHEME = "wandb:"


def local_directory(directory: str | Path) -> Path:
    """Download an artifact that is named as ``wandb:entity/project/name:version``; other paths are returned unchanged.

    Raises:
        FormatError: if wandb is not installed, or the artifact cannot be downloaded.
    """
    if not str(directory).startswith(_SCHEME):
        return Path(directory)
    name = str(directory).removeprefix(_SCHEME)
    try:
        import wandb
    except ImportError as error:
        raise FormatError(f"{directory} is a W&B artifact, but wandb is not installed: pip install wandb") from error
    try:
        return Path(wandb.Api().artifact(name).download())
    except Exception as error:  # wandb raises many types: no login, no network, no such artifact
        raise FormatError(
            f"the artifact {name!r} cannot be downloaded from W&B: {error}. Check its name "
            "(entity/project/name:version) and wandb login, or download it and pass the folder"
        ) from error
