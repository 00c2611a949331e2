"""Read rows of text from the demo corpus, local files or the Hugging Face hub, and check their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_peft import demo
from lightning_peft.core.names import nearest

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def load_rows(source: str, split: str, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read some columns of one split.

    Args:
        source: ``"demo"``, the path of a csv, tsv, json, jsonl, parquet or txt file, possibly compressed, or the id of
            a dataset on the Hugging Face hub.
        split: The split to read from ``"demo"`` or a hub dataset; ignored for a file.
        columns: The columns to return.

    Returns:
        One dictionary per row, in the source's order.

    Raises:
        FileNotFoundError: ``source`` is written like a file path, but the file does not exist.
        ValueError: The format is unknown, or the split or a column is missing.
    """
    if source == "demo":
        rows = demo.load(split)
        _check_columns(list(rows[0]), columns, f"the demo corpus's {split!r} split")
        return [{name: row[name] for name in columns} for row in rows]

    import datasets

    if is_file(source):
        path = Path(source).expanduser()
        if not path.is_file():
            siblings = [child.name for child in path.parent.glob("*")]
            raise FileNotFoundError(f"there is no file {source!r}{_nearest(path.name, siblings)}.")
        kind = next(_FORMATS[suffix] for suffix in path.suffixes if suffix in _FORMATS)
        options = {"delimiter": "\t"} if ".tsv" in path.suffixes else {}
        table = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    else:
        table = _from_hub(source, split)
    _check_columns(table.column_names, columns, repr(source))
    return [dict(row) for row in table.select_columns(list(columns))]


def is_file(source: str) -> bool:
    """True if ``source`` is written like a file path instead of a dataset's name.

    Raises:
        ValueError: It is a path, but its format is not supported.
    """
    if any(suffix in _FORMATS for suffix in Path(source).suffixes):
        return True
    if source.startswith((".", "/", "~")) or Path(source).exists():
        raise ValueError(f"{source!r} has an unknown format: the file's name must end in one of {', '.join(_FORMATS)}.")
    return False


def _from_hub(source: str, split: str) -> Any:
    import datasets

    splits = datasets.get_dataset_split_names(source)
    if split not in splits:
        raise ValueError(f"the dataset {source!r} has no split {split!r}; it has {', '.join(splits)}.")
    return datasets.load_dataset(source, split=split)


def _check_columns(present: list[str], wanted: tuple[str, ...], where: str) -> None:
    for name in wanted:
        if name not in present:
            raise ValueError(f"{where} has no column {name!r}{_nearest(name, present)}; it has {', '.join(present)}.")


def _nearest(name: str, others: list[str]) -> str:
    near = nearest(name, others, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
