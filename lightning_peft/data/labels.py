"""Find the labels of a column, check those of the other splits, and describe their balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.core.names import nearest
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset


def label_values(table: Dataset, column: str, where: str) -> list[Any]:
    """The labels of each row: one value, or a list of values. Numbers of a hub dataset become their names.

    Raises:
        InputError: if a row has no label, or a number that has no name.
    """
    import datasets

    feature = table.features[column]
    inner = getattr(feature, "feature", feature)
    names = inner.names if isinstance(inner, datasets.ClassLabel) else None
    values = table[column][:]
    for i, value in enumerate(values):
        parts = value if isinstance(value, list) else [value]
        if value is None or None in parts:
            raise InputError(f"row {i} of {where!r} has no label in the column {column!r}: fill or remove the row.")
        for part in parts:
            if names is not None and not 0 <= part < len(names):
                raise InputError(
                    f"row {i} of {where!r} has the label {part} in the column {column!r}, outside the range 0 to "
                    f"{len(names) - 1}. Hub datasets use -1 for a split without labels: choose another split."
                )
    if names is None:
        return values
    return [[names[part] for part in v] if isinstance(v, list) else names[v] for v in values]


def find_labels(values: Iterable[Any], column: str, where: str) -> list[Any]:
    """The different labels in sorted order.

    Raises:
        InputError: if there is only one label, or the column holds numbers with fractions.
    """
    labels = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    fraction = next((value for value in labels if isinstance(value, float) and value != int(value)), None)
    if fraction is not None:
        raise InputError(
            f"the column {column!r} of {where!r} holds numbers such as {fraction}, not labels: to predict numbers, use "
            "TextRegressor with TextRegressionData."
        )
    if len(labels) < 2:
        only = f"only the label {labels[0]!r}" if labels else "no label"
        raise InputError(
            f"the column {column!r} of {where!r} has {only}: a classifier needs at least two. Check the column's name, "
            "or add rows of other labels."
        )
    return [int(value) if isinstance(value, float) else value for value in labels]


def in_order_of(labels: list[Any], names: Sequence[str]) -> list[Any]:
    """The labels in the order of a pretrained classifier's outputs, if these have the same names."""
    by_name = {label_name(label): label for label in labels}
    return [by_name[name] for name in names] if set(names) == set(by_name) else labels


def number_of(value: Any, numbers: dict[str, int], split: str, row: int | None = None) -> int:
    """The number of a label.

    Raises:
        InputError: if the label does not occur in training.
    """
    name = label_name(value)
    if name in numbers:
        return numbers[name]
    near = nearest(name, list(numbers), n=1)
    hint = f"; the closest label is {near[0]!r}" if near else ""
    where = "" if row is None else f" (row {row})"
    raise InputError(f"the {split} split contains label {value!r}, which never occurs in training{where}{hint}.")


def label_name(value: Any) -> str:
    """A label as a string. ``3.0`` becomes ``"3"``, because an empty row turns a column of integers into floats."""
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


def report_balance(values: Sequence[Any], split: str) -> None:
    """Log how many rows, labels and rows per label a split has."""
    counts = Counter(map(label_name, values)).most_common()
    (most, high), (least, low) = counts[0], counts[-1]
    rank_zero_info(
        f"{split}: {len(values):,} labels of {len(counts)} classes; most frequent {most!r} "
        f"({100 * high / len(values):.1f} %), least frequent {least!r} ({100 * low / len(values):.1f} %)"
    )
