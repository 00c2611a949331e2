"""Read files written by ``torch.save`` as data: tensors and plain values, never code."""

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
    """Name the file in every error raised inside the context; errors of other packages become a StateError."""
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
        path: the file.
        map_location: the device to put the tensors on.
        mmap: leave tensors on disk until they are used.

    Raises:
        StateError: if the file does not exist, was not written by ``torch.save``, is damaged, or would run code when
            it is read.
    """
    path = Path(path)
    if not path.is_file():
        raise StateError(f"there is no file {path}")
    try:
        check_zip(path, checksums=not mmap)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns about files that it did not write
            found = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap or None)
        _check_sizes(found)
        return found
    except Exception as error:
        # A damaged or hostile file can make torch raise anything.
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            reason = (str(error) or type(error).__name__).strip().splitlines()[-1 if "\n" in str(error) else 0]
            raise StateError(f"{path} is not a torch file that holds only tensors and plain values: {reason}") from None
        raise StateError(
            f"{path} was not read, because reading it would run {named[1]} ({_reason(error)}). Checkpoints of this "
            "package hold only tensors and plain values. If this is your own class and you trust the file, allow it "
            "with torch.serialization.add_safe_globals([...]), or pass weights_only=False when you load it"
        ) from None


def _check_sizes(value: object) -> None:
    """Refuse tensors that repeat a few stored values so many times that copying them would exhaust the memory."""
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
    """Return torch's own sentence about what it refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(line for line in lines if "GLOBAL" in line)
