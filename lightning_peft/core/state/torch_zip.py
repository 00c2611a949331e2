"""Check the zip archive that ``torch.save`` writes before torch reads it.

torch's reader takes sizes from the archive, decompresses, and compares no checksum: a damaged or hostile file makes it
allocate far more than the file holds, or return other numbers.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["check_zip"]

MAX_ENTRIES = 1_000_000
MAX_PICKLE = 256 * 2**20  #: bytes of the pickle, which holds everything but the tensors' values


def check_zip(path: Path, checksums: bool = True) -> None:
    """Refuse an archive that ``torch.save`` does not write; files that are not zip archives pass.

    Args:
        path: of the file.
        checksums: read all of it, and compare the checksums that the archive has of its entries.

    Raises:
        ValueError: the archive is cut off or damaged, or an entry is compressed or larger than the file.
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
        raise ValueError(f"the zip archive is damaged: the checksum of {damaged!a} does not hold")


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
            # The one function that torch allows a pickle to call and that takes a size.
            if b"\nbytearray\n" in archive.read(entry):
                raise ValueError("its pickle holds a bytearray, which is not a plain value")
