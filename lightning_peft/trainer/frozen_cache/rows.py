"""Recognise a row of a batch by its content, so that nothing has to be known about the dataset or its order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["BatchError", "row_keys"]

_PLAIN = (str, bytes, int, float, bool, type(None))


class BatchError(ValueError):
    """A batch cannot be split into rows."""


def row_keys(batch: Any) -> list[str]:
    """Return a key for each row of ``batch``: a digest of the row's part of every tensor and list in the batch.

    Args:
        batch: a tensor, or nested tuples, lists and mappings of tensors and plain values. The number of rows is the
            most common size of the first dimension. Tensors of that size, and lists of that many plain values, are
            split into rows; everything else belongs to every row. A row that is padded to a different length is a
            different row.

    Raises:
        BatchError: if there is no tensor to split, or something that is neither a tensor nor a plain value.
    """
    found = list(_leaves(batch, ""))
    sizes = [len(value) for _, value in found if isinstance(value, Tensor) and value.ndim]
    if not sizes:
        raise BatchError("the batch has no tensor whose first dimension could be its rows")
    rows = max(sizes, key=sizes.count)
    common = hashlib.blake2b(digest_size=16)
    split: list[tuple[bytes, Any]] = []
    for path, value in found:
        if isinstance(value, Tensor):
            whole = value.ndim == 0 or len(value) != rows
            shape = tuple(value.shape if whole else value.shape[1:])
            header = repr((path, str(value.dtype), shape)).encode()
            if whole:
                common.update(header + _bytes(value, 1)[0].tobytes())
            else:
                split.append((header, _bytes(value, rows)))
        elif isinstance(value, list) and len(value) == rows:
            split.append((path.encode(), [repr(entry).encode() for entry in value]))
        else:
            common.update(repr((path, value)).encode())
    digests = [common.copy() for _ in range(rows)]
    for header, parts in split:
        for digest, part in zip(digests, parts):
            digest.update(header)
            digest.update(part)
    return [digest.hexdigest() for digest in digests]


def _bytes(tensor: Tensor, rows: int) -> Any:
    if not tensor.numel():
        return [memoryview(b"")] * rows
    return tensor.detach().cpu().contiguous().reshape(rows, -1).view(torch.uint8).numpy()


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield tensors, plain values and lists of plain values, with their paths."""
    if isinstance(value, (Tensor, *_PLAIN)):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{path}/{key}")
    elif isinstance(value, list | tuple) and not all(isinstance(part, _PLAIN) for part in value):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}/{i}")
    elif isinstance(value, list | tuple):
        yield path, list(value)
    else:
        raise BatchError(f"the batch holds a {type(value).__name__}{f' at {path}' if path else ''}")
