"""Distributed checkpoints, read as data: torch's own reader unpickles whatever their files name.

A folder's ``.metadata`` is a pickle of a few classes of torch's, and values that are no tensors (an optimizer's
options) are small pickles of their own. Both are checked before torch reads them.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from lightning_peft.core.state.state_dict import StateError

__all__ = ["PlainPlanner", "check_metadata"]

_OWNERS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"}


def check_metadata(folder: Path) -> Any:
    """Make sure that reading a distributed checkpoint runs nothing and stays in its folder.

    Returns:
        torch's ``Metadata``: what tensors there are, and where.

    Raises:
        StateError: its metadata is missing or damaged, names other classes than torch's, or files elsewhere.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise StateError(f"{folder} is no distributed checkpoint: it has no .metadata")
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes()), str(path)).load()
        files = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    except StateError:
        raise
    except Exception as error:  # a damaged pickle can make anything be raised
        raise StateError(f"{path} cannot be read: {error!r}") from error
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise StateError(f"{path} names files outside of its folder: {outside[:3]}")
    return metadata


class PlainPlanner(DefaultLoadPlanner):
    """Loads tensors and plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Check a value that is no tensor, then load it.

        Raises:
            StateError: it is an object of some other kind, which would be run to read it.
        """
        try:
            torch.load(value, weights_only=True)
        except Exception as error:  # a damaged pickle can make anything be raised
            key = read_item.dest_index.fqn
            raise StateError(f"{key!r} in the checkpoint is no plain value, and was not read") from error
        value.seek(0)
        super().load_bytes(read_item, value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, where: str) -> None:
        super().__init__(file)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        known = (
            (module.partition(".")[0] == "pathlib" and name in _PATHS)
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module, name) == ("torch.serialization", "_get_layout")
        )
        if known or (module in _OWNERS and "." not in name):
            found = super().find_class(module, name)
            if known or (isinstance(found, type) and found.__module__ == module):
                return found
        raise StateError(f"{self.where} was not read: to read it, {module}.{name} would be run")
