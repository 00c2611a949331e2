"""Read distributed checkpoints as data, without running code from them.

torch's own reader unpickles anything that the files name. A checkpoint folder has two kinds of pickle: ``.metadata``,
which needs only a few torch classes, and one small pickle per value that is not a tensor (an optimizer's options).
Both are checked before torch reads them.
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
    """Check that reading a distributed checkpoint runs no code and opens no file outside its folder.

    Returns:
        torch's ``Metadata``, which lists the stored tensors and their files.

    Raises:
        StateError: if the metadata is missing or damaged, names a class that is not part of torch, or names a file
            outside the folder.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise StateError(f"{folder} is not a distributed checkpoint: it has no .metadata")
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes()), str(path)).load()
        files = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
        metadata.state_dict_metadata.items()  # the fields that are read later must be there
    except StateError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise StateError(f"{path} cannot be read: {error!r}") from error
    # torch joins these names to the folder, so "../x" or an absolute path would read a file elsewhere.
    outside = sorted(file for file in files if Path(file).name != file)
    if outside:
        raise StateError(f"{path} names files outside its folder: {outside[:3]}")
    return metadata


class PlainPlanner(DefaultLoadPlanner):
    """A load planner that reads tensors and plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Check a value that is not a tensor, then load it.

        Raises:
            StateError: if the value is an object that only running its code could restore.
        """
        try:
            torch.load(value, weights_only=True)
        except Exception as error:  # a damaged pickle can raise any exception
            key = read_item.dest_index.fqn
            raise StateError(
                f"{key!r} in the checkpoint is not a plain value, so it was not read: use a checkpoint "
                "that the Trainer wrote"
            ) from error
        value.seek(0)  # the base class reads the same bytes again, with weights_only=False
        super().load_bytes(read_item, value)


class _Unpickler(pickle.Unpickler):
    """An unpickler that resolves only the classes that torch writes into ``.metadata``."""

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
            # Only classes defined in these modules: a function, or something they merely import, could run code.
            if known or (isinstance(found, type) and found.__module__ == module):
                return found
        raise StateError(f"{self.where} was not read: reading it would run {module}.{name}")
