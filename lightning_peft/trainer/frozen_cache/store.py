"""Keep activations on disk: rows by key, in safetensors files that are memory-mapped and never change."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.core.state.atomic_file import new_file
from lightning_peft.trainer.frozen_cache.replay import Activations

__all__ = ["Store"]

_SHARD = 64 * 2**20  #: bytes after which a file is written


class Store:
    """The activations of rows, in one folder that several processes and runs may share.

    Each file has the tensor ``KEY.N`` for the N-th stored tensor of the row with that key, and in its metadata the
    shapes of all tensors of skipped calls, and a checksum for each stored one, which is checked on the first read. A
    file is complete as soon as it has its name, and never changes; each process writes its own files.

    Args:
        folder: created if it does not exist.
        used: for each call, the positions of the tensors that are stored.
    """

    def __init__(self, folder: Path, used: Sequence[Sequence[int]]) -> None:
        self.folder, self._used = folder, [sorted(positions) for positions in used]
        self._where: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._shapes: dict[str, list[list[tuple[int, ...]]]] = {}
        self._sums: dict[str, int] = {}  # checksums of tensors that have not been read yet
        self._buffer: dict[str, list[Tensor]] = {}
        self._size = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._where or key in self._buffer

    def __len__(self) -> int:
        return len(self._where.keys() | self._buffer.keys())

    def refresh(self) -> None:
        """Find the files that other processes have written since."""
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            if path in self._files:
                continue
            try:
                file = safe_open(path, "pt")
                shapes, rows, sums = (json.loads(file.metadata()[name]) for name in ("shapes", "rows", "sums"))
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                warnings.warn(f"{path} is damaged ({error}), so its rows are computed again: delete it", stacklevel=2)
                self._files[path] = None
                continue
            self._files[path] = file
            for key, which in rows.items():
                self._where[key] = path
                self._shapes[key] = [[tuple(shape) for shape in call] for call in shapes[which]]
            self._sums.update(sums)

    def add(self, keys: Sequence[str], activations: Activations) -> None:
        """Store the rows of a batch that are new."""
        parts = [tensor.cpu() for tensor in activations.tensors()]
        for row, key in enumerate(keys):
            if key in self:
                continue
            self._buffer[key] = [part[row].clone() for part in parts]
            self._shapes[key] = activations.shapes
            self._size += sum(tensor.nbytes for tensor in self._buffer[key])
        if self._size >= _SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory to a file.

        Raises:
            OSError: if the file cannot be written; the message names it.
        """
        if not self._buffer:
            return
        tensors = {f"{key}.{i}": t.contiguous() for key, parts in self._buffer.items() for i, t in enumerate(parts)}
        shapes: list[Any] = []
        rows = {}
        for key in self._buffer:
            if self._shapes[key] not in shapes:
                shapes.append(self._shapes[key])
            rows[key] = shapes.index(self._shapes[key])
        sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        path = self.folder / f"rows-{uuid.uuid4().hex}.safetensors"
        with new_file(path) as temporary:
            metadata = {"shapes": shapes, "rows": rows, "sums": sums}
            save_file(tensors, temporary, {name: json.dumps(value) for name, value in metadata.items()})
        self._buffer, self._size = {}, 0
        self.refresh()

    def read(self, keys: Sequence[str]) -> Activations:
        """Return the rows with these keys, as a batch.

        Raises:
            OSError: if a stored tensor is damaged.
        """
        rows = [self._row(key) for key in keys]
        tensors = iter(torch.stack(column) for column in zip(*rows))
        return Activations(self._shapes[keys[0]], [{i: next(tensors) for i in call} for call in self._used])

    def room(self, rows: int) -> tuple[int, int]:
        """Return the bytes that ``rows`` rows like those in memory would take, and the free bytes on the disk."""
        each = self._size // max(1, len(self._buffer))
        return rows * each, shutil.disk_usage(self.folder).free

    def _row(self, key: str) -> list[Tensor]:
        if key in self._buffer:
            return self._buffer[key]
        file = self._files[self._where[key]]
        return [self._checked(file, f"{key}.{i}", key) for i in range(sum(map(len, self._used)))]

    def _checked(self, file: Any, name: str, key: str) -> Tensor:
        tensor = file.get_tensor(name)
        expected = self._sums.pop(name, None)
        if expected is not None and expected != _checksum(tensor):
            path = self._where[key]
            raise OSError(f"{path} has changed since it was written: delete it, and its rows are computed again")
        return tensor


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
