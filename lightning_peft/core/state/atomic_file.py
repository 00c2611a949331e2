"""Write files so that a full disk, a missing permission or a killed process leaves the previous file unchanged."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["new_file", "recover_folder", "replace_folder", "save_torch_file", "to_disk", "writing"]


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; what is written there replaces ``path`` in one step.

    The temporary file is in the same folder because a move between two file systems copies, and a process that is
    killed while it copies leaves a truncated file. Its name is always the same, so killed runs leave at most one.

    Raises:
        OSError: if the file cannot be written; ``path`` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Move the complete folder ``new`` to ``path``. :func:`recover_folder` finishes this if a kill interrupts it."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    _remove(old)


def recover_folder(new: Path, path: Path) -> None:
    """Finish an interrupted :func:`replace_folder`; do nothing if there is none."""
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(new, path)
        _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_torch_file(value: object, path: str | Path) -> None:
    """Write ``value`` with ``torch.save``, in one step.

    Raises:
        OSError: if the file cannot be written; ``path`` is unchanged.
    """
    with new_file(path) as temporary, temporary.open("wb") as file:  # given a path, torch.save hides the system's error
        torch.save(value, file)


def to_disk(path: Path) -> None:
    """Wait until the file is on the disk; without this, a power failure could leave an empty file under its name."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name ``path`` in failures to write it, and say that its earlier content is unchanged.

    Raises:
        OSError: if writing fails, with the system's error number; other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if (number := _error_number(error)) is None:
            raise
        advice = "choose another folder"
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "free disk space, or choose another folder"
        what = f"{os.strerror(number)}: nothing was saved, and the earlier content is unchanged; {advice}"
        raise OSError(number, what, str(path)) from error


def _error_number(error: BaseException | None) -> int | None:
    """The system's number of an error of this kind; torch and safetensors put it in the context or in the text."""
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" and (hidden := re.search(r"\(os error (\d+)\)", str(error))):
        return int(hidden[1])
    return _error_number(error.__context__) if type(error) is RuntimeError else None
