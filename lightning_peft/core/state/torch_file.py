"""Files that ``torch.save`` wrote, read as data: tensors and plain values, never a program."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.state.torch_zip import check_zip

__all__ = ["naming", "read_torch_file"]


@contextmanager
def naming(path: str | Path | None) -> Iterator[None]:
    """Name the file in every error that what it says leads to; an error that is not this package's is a StateError."""
    try:
        yield
    except Exception as error:
        told = path is None or str(path) in str(error)
        if type(error).__module__.startswith("lightning_peft."):
            error.args = error.args if told else (f"{path}: {error}",)
            raise
        what = str(error) if isinstance(error, ValueError) else repr(error)
        raise StateError(what if told else f"{path}: {what}") from error


def read_torch_file(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Read a checkpoint or a state dict.

    Args:
        path: of the file.
        map_location: where to put the tensors.
        mmap: leave tensors on the disk until they are used.

    Raises:
        StateError: there is no such file; it is none of torch's, or damaged; it would run code when it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise StateError(f"there is no file {path}")
    try:
        check_zip(path, checksums=not mmap)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on files that are none of torch's
            found = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
        _check_sizes(found)
        return found
    except Exception as error:
        # A damaged or hostile file can make torch raise anything.
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1 if "\n" in str(error) else 0]
            raise StateError(
                f"{path} is no file of torch's that holds tensors and plain values only: {reason}"
            ) from None
        raise StateError(
            f"{path} was not read: to read it, {named[1]} would be run ({_reason(error)}). Checkpoints of this package "
            "hold tensors and plain values only. If that is a class of your own and you trust the file, allow it: "
            "torch.serialization.add_safe_globals([...]), or choose weights_only=False where you load it"
        ) from None


def _check_sizes(value: Any) -> None:
    """Refuse tensors that repeat a few stored values so often that a copy of them would fill the memory."""
    left, seen = [value], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
            if size > max(16 * stored, 2**26):
                raise ValueError(f"a tensor of {size:,} bytes is declared over {stored:,} stored ones")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += [*value.values()] if isinstance(value, dict) else value


def _reason(error: Exception) -> str:
    """torch's own sentence about what it refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(line for line in lines if "GLOBAL" in line)
