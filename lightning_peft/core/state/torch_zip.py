"""Check a zip archive written by ``torch.save`` before torch reads it.

torch's reader trusts the sizes in the archive, decompresses entries, and does not compare checksums. A damaged or
hostile file can make it allocate far more memory than the file holds, or return wrong numbers.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["check_zip"]

MAX_ENTRIES = 1_000_000
MAX_PICKLE = 256 * 2**20  #: bytes of the pickle, which holds everything except the tensors' values


def check_zip(path: Path, checksums: bool = True) -> None:
    """Refuse a zip archive that ``torch.save`` would not write; files that are not zip archives pass.

    Args:
        path: the file.
        checksums: read the whole file, and compare the checksums of its entries.

    Raises:
        ValueError: if the archive is truncated or damaged, or if an entry is compressed or larger than the file.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, path.stat().st_size)
            damaged = archive.testzip() if checksums else None
    except ValueError:
        raise
    except Exception as error:  # a damaged archive can make zipfile raise anything
        raise ValueError(f"the zip archive is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"the zip archive is damaged: the checksum of {damaged!a} is wrong")


def _check_entries(archive: zipfile.ZipFile, size: int) -> None:
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if len(names) != len(entries) or len(entries) > MAX_ENTRIES:
        raise ValueError(f"the zip archive has {len(entries):,} entries of {len(names):,} names")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("an entry of the zip archive is compressed, which torch.save does not do")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("the entries of the zip archive are larger than the file")
    for entry in entries:
        if entry.filename.endswith("/data.pkl"):
            if entry.file_size > MAX_PICKLE:
                raise ValueError(f"its pickle has {entry.file_size:,} bytes; at most {MAX_PICKLE:,} are read")
            # bytearray is the only function that torch lets a pickle call with a size, so it could allocate any amount.
            if b"\nbytearray\n" in archive.read(entry):
                raise ValueError("its pickle holds a bytearray, which is not a plain value")
