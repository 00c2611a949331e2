"""Files that ``torch.save`` wrote, read as data: tensors and plain values, never a program."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft.core.state import StateError

__all__ = ["read_torch_file"]


def read_torch_file(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a checkpoint or a state dict.

    Args:
        path: of the file.
        map_location: where to put the tensors.
        mmap: leave tensors on the disk until they are used.

    Raises:
        StateError: there is no such file; it is none of torch's; it would run code when it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise StateError(f"there is no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on files that are none of torch's
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
    except Exception as error:
        # A damaged or hostile file can make torch raise anything.
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1 if "\n" in str(error) else 0]
            raise StateError(
                f"{path} is no file of torch's that holds tensors and plain values only: {reason}"
            ) from None
        raise StateError(
            f"{path} was not read: to read it, {named[1]} would be run. Checkpoints of this package hold tensors and "
            "plain values only. If that is a class of your own and you trust the file, allow it: "
            "torch.serialization.add_safe_globals([...])"
        ) from None
