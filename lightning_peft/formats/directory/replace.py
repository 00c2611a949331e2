"""Replace the files of an adapter directory, so that a kill at any moment leaves the old adapter or the new one.

No system call replaces two files at once. The old configuration is moved away first and the new one comes last, so at
no time does a configuration lie next to the tensors of another adapter. A directory without a configuration, because
the process was killed between these moves, is completed by its next reader or writer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: an interrupted replacement is then not completed, and its directory not loaded
    fcntl = None  # type: ignore[assignment]

__all__ = ["CARD", "CONFIG", "WEIGHTS", "complete_replacement", "replace_files"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
_ORDER = (CARD, WEIGHTS, CONFIG)
_OLD = "old"  #: the folder in the temporary one for the files that are replaced


def replace_files(directory: Path, beside: Path) -> None:
    """Move the files in ``beside`` over those in ``directory``; if a move fails, put the old files back.

    Args:
        directory: The adapter directory.
        beside: A temporary folder in ``directory`` with complete files, whose name begins with a dot.
    """
    new = [name for name in _ORDER if (beside / name).exists()]
    old = beside / _OLD
    with _locked(beside):
        old.mkdir()
        try:
            for name in reversed(new):
                if os.path.lexists(directory / name):
                    os.replace(directory / name, old / name)
            for name in new:
                os.replace(beside / name, directory / name)
        except BaseException:
            for name in new:
                if os.path.lexists(old / name):
                    os.replace(old / name, directory / name)
                elif not (beside / name).exists():
                    (directory / name).unlink()
            raise


def complete_replacement(directory: Path) -> None:
    """Finish a :func:`replace_files` whose process was killed; do nothing if there is none, or if it still runs."""
    if fcntl is None or os.path.lexists(directory / CONFIG) or not directory.is_dir():
        return
    for beside in sorted(p for p in directory.iterdir() if p.name.startswith(f".{directory.name}.")):
        if beside.is_symlink() or not (beside / _OLD).is_dir() or not (beside / CONFIG).is_file():
            continue
        with suppress(OSError), _locked(beside):  # it is locked while its process lives
            for name in _ORDER:
                if (beside / name).exists():
                    os.replace(beside / name, directory / name)
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` until the end or the death of this process.

    Raises:
        OSError: if another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
