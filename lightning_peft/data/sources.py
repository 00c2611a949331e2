"""Read tables from the demo corpus, local files or the Hugging Face hub, and check their columns."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft import demo
from lightning_peft.core.names import nearest
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def load_table(source: str, split: str) -> Dataset:
    """Read one split with all of its columns.

    Args:
        source: ``"demo"``, the path of a csv, tsv, json, jsonl, parquet or txt file, possibly compressed, or the id of
            a dataset on the Hugging Face hub.
        split: The split to read from ``"demo"`` or a hub dataset; ignored for a file.

    Raises:
        FileNotFoundError: if ``source`` is written like a file path, but the file does not exist.
        InputError: if the file cannot be read or has no rows, its format is unknown, or the split is missing.
    """
    import datasets

    if source == "demo":
        return datasets.Dataset.from_list(demo.load(split))
    table = _from_file(source, split) if is_file(source) else _from_hub(source, split)
    if not len(table):
        raise InputError(f"the {split} split is empty: {source!r} has no rows.")
    return table


def is_file(source: str) -> bool:
    """True if ``source`` is written like a file path instead of a dataset's name.

    Raises:
        InputError: if it is a path, but its format is not supported.
    """
    if any(suffix in _FORMATS for suffix in Path(source).suffixes):
        return True
    if source.startswith((".", "/", "~")) or Path(source).exists():
        raise InputError(f"{source!r} has an unknown format: the file's name must end in one of {', '.join(_FORMATS)}.")
    return False


def check_columns(present: Sequence[str], wanted: Sequence[str], source: str, split: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        InputError: if it does; the message names the closest column, or says that the file seems to have no header.
    """
    missing = [name for name in wanted if name not in present]
    if not missing:
        return
    where = f"the demo corpus's {split!r} split" if source == "demo" else repr(source)
    separator = next((mark for mark in (";", "\t", "|") if len(present) == 1 and mark in present[0]), None)
    if separator is not None:
        raise InputError(
            f"{where} has no column {missing[0]!r}: its columns are separated by {separator!r}. Save it with commas as "
            ".csv, or with tabs as .tsv."
        )
    name, near = missing[0], nearest(missing[0], list(present), n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    shown = ", ".join(text if len(text) <= 40 else f"{text[:40]}..." for text in present)
    tail = ""
    if source != "demo" and {".csv", ".tsv"} & set(Path(source).suffixes) and len(missing) == len(wanted):
        tail = " If this is the first row of the data, add a header line with the columns' names to the file."
    raise InputError(f"{where} has no column {name!r}{hint}; it has {shown}.{tail}")


def find_file(path: Path, shown: str | None = None) -> Path:
    """Return ``path`` if it exists.

    Raises:
        FileNotFoundError: if it does not; the message names the closest file in its folder.
    """
    if not path.exists():
        near = nearest(path.name, [child.name for child in path.parent.glob("*")], n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FileNotFoundError(f"there is no file {shown or str(path)!r}{hint}.")
    return path


def _from_file(source: str, split: str) -> Dataset:
    import datasets

    path = find_file(Path(source).expanduser(), source)
    kind = next(_FORMATS[suffix] for suffix in path.suffixes if suffix in _FORMATS)
    options = {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
    if not path.stat().st_size:
        raise InputError(f"{source!r} is empty.")
    if path.suffix in (".csv", ".tsv"):
        _check_fields(path, source, options.get("delimiter", ","))
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = str(cause).strip().splitlines() or [type(cause).__name__]
        if "corresponds to no data" in said[0]:  # the error of datasets for a table that has only a header
            raise InputError(f"the {split} split is empty: {source!r} has no rows.") from error
        raise InputError(f"{source!r} cannot be read as {kind}: {said[0]}") from error


def _check_fields(path: Path, source: str, delimiter: str) -> None:
    """Refuse rows with more fields than the header: pandas would take the first field of every row as its index."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = filter(None, csv.reader(file, delimiter=delimiter))
            columns = len(next(rows, []))
            for number, row in enumerate(rows):
                if len(row) > columns:
                    raise InputError(
                        f"row {number} of {source!r} has {len(row)} fields, but the header has {columns}: put texts "
                        f"that contain {delimiter!r} into quotation marks."
                    )
    except UnicodeDecodeError as error:
        raise InputError(f"{source!r} is not encoded in UTF-8 ({error.reason}): save it as UTF-8.") from error
    except csv.Error:
        return  # the reader of datasets reports what is wrong


def _from_hub(source: str, split: str) -> Dataset:
    import datasets

    try:
        splits = datasets.get_dataset_split_names(source)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"source={source!r} is neither a file nor a dataset of the Hugging Face hub that can be reached: {said[0]}"
        ) from error
    if split not in splits:
        raise InputError(f"the dataset {source!r} has no split {split!r}; it has {', '.join(splits)}.")
    return datasets.load_dataset(source, split=split)
