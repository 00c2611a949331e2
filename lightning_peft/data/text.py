"""Data for classifying texts and pairs of texts, and for regression on them."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft import demo
from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.data.labelled import LabelledData
from lightning_peft.data.labels import label_values, number_of, report_balance
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset


class _TextsWithTargets(TextDataModule):
    """One text or pair of texts per row, and a column that the model predicts."""

    def __init__(
        self,
        source: str,
        validation: str | None,
        test: str | None,
        text: str,
        text_pair: str | None,
        label: str,
        **options: Any,
    ) -> None:
        super().__init__(source, validation=validation, test=test, **options)
        self.text, self.text_pair, self.label = text, text_pair, label
        self.columns = (text, label) if text_pair is None else (text, text_pair, label)
        self.targets = (label,)

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize texts or pairs, and attach their targets except in the ``predict`` split."""
        pair: dict[str, Any] = {}
        if self.text_pair is not None:
            for i, row in enumerate(rows):
                if not isinstance(row[self.text_pair], str):
                    raise InputError(
                        f"row {i} of {self.where(split)!r} has {row[self.text_pair]!r} in the column "
                        f"{self.text_pair!r} instead of a text: fill or remove it."
                    )
            pair = {"text_pair": [row[self.text_pair] for row in rows]}
        tokens = self.tokenize([row[self.text] for row in rows], split, **pair)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        examples: list[Example] = [dict(zip(names, values)) for values in zip(*(tokens[name] for name in names))]
        if split != "predict":
            for i, (example, row) in enumerate(zip(examples, rows)):
                example["label"] = self.target(row[self.label], split, i)
        return examples

    def target(self, value: Any, split: str, row: int) -> Any:
        """The number, or the numbers, that the model learns for a value of the label column."""
        raise NotImplementedError

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, ``(batch, longest)``, and ``labels`` except in ``predict``."""
        batch = self.pad(examples)
        return batch if split == "predict" else {**batch, "labels": torch.tensor([e["label"] for e in examples])}


class TextClassificationData(LabelledData, _TextsWithTargets):
    """Texts, or pairs of texts, with one label or several labels each.

    Labels may be names or numbers. They are numbered in sorted order; the demo's labels are in the order of its model's
    configuration. After ``setup``, ``labels`` lists them.

    Args:
        source: ``"demo"``, the path of a csv, tsv, json, jsonl, parquet or txt file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        text: The column of texts.
        text_pair: The column of second texts, to classify pairs (a question and an answer, a premise and a hypothesis).
        label: The column of labels.
        label_separator: Each row has any number of labels, separated by this text (``"|"``); JSON files may also have
            lists. ``None`` for one label per row.
        tokenizer: A model's folder or hub id; ``None`` uses the tokenizer of the module being trained.
        batch_size: Texts per batch and process.
        max_length: Longer texts are cut to this many tokens.
        num_workers: Worker processes per loader.
        adapter_column: The column that names each row's adapter; an empty value selects the base alone. Batches then
            contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.
        **options: ``predict``, ``validation_fraction`` and ``group_by_length``, as for :class:`TextDataModule`.

    Example:
        >>> data = TextClassificationData("demo", batch_size=8)
        >>> data.setup()
        >>> next(iter(data.val_dataloader()))["labels"].shape
        torch.Size([8])
    """

    def __init__(
        self,
        source: str = "demo",
        validation: str | None = None,
        test: str | None = None,
        text: str = "text",
        label: str = "label",
        text_pair: str | None = None,
        label_separator: str | None = None,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        num_workers: int = 0,
        adapter_column: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            source,
            validation,
            test,
            text,
            text_pair,
            label,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            num_workers=num_workers,
            adapter_column=adapter_column,
            **options,
        )
        self.label_separator = label_separator
        self.multi_label = label_separator is not None

    def check(self, table: Dataset, split: str) -> None:
        """Check that every label occurs in training."""
        if split == "predict":
            return
        numbers = self.numbers()
        for i, value in enumerate(self._values(table, split)):
            for part in value if isinstance(value, list) else [value]:
                number_of(part, numbers, split, i)
        if split == "train":
            report_balance(self.all_labels(table, split), split)

    def target(self, value: Any, split: str, row: int) -> Any:
        """A number, or 0 or 1 for each label if rows have several."""
        numbers = self.numbers()
        if not self.multi_label:
            return number_of(self.named(value, self.label), numbers, split, row)
        present = {number_of(part, numbers, split, row) for part in self._parts(value)}
        return [float(i in present) for i in range(len(numbers))]

    def find_labels(self) -> list[Any]:
        """The labels of the training split; the demo's are in the order of its model's outputs."""
        return list(demo.labels()) if self.source == "demo" else super().find_labels()

    def all_labels(self, table: Dataset, split: str) -> list[Any]:
        """Every label of a split, as often as it occurs."""
        values = self._values(table, split)
        self.multi_label = self.multi_label or any(isinstance(value, list) for value in values)
        return list(chain(*values)) if self.multi_label else values

    def _values(self, table: Dataset, split: str) -> list[Any]:
        if self.label_separator is None:
            return label_values(table, self.label, self.where(split))
        # If rows have several labels, an empty cell means a row without labels.
        return [self._parts(value) for value in table[self.label][:]]

    def _parts(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return [self.named(part, self.label) for part in value]
        parts = str("" if value is None else value).split(self.label_separator)
        return [part.strip() for part in parts if part.strip()]


class TextRegressionData(_TextsWithTargets):
    """Texts, or pairs of texts, with a number each.

    Args:
        source: The path of a csv, tsv, json, jsonl, parquet or txt file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        text: The column of texts.
        text_pair: The column of second texts, for pairs (two sentences and how similar they are).
        label: The column of numbers.
        **options: ``tokenizer``, ``max_length``, ``batch_size``, ``predict`` and the others of :class:`TextDataModule`.

    Example::

        TextRegressionData("sts.csv", text="sentence1", text_pair="sentence2", label="score", validation_fraction=0.1)
    """

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        text: str = "text",
        label: str = "label",
        text_pair: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, validation, test, text, text_pair, label, **options)

    def check(self, table: Dataset, split: str) -> None:
        """Check that every row has a number."""
        if split != "predict":
            for i, value in enumerate(table[self.label][:]):
                self.target(value, split, i)

    def target(self, value: Any, split: str, row: int) -> float:
        """The number as it is."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"row {row} of {self.where(split)!r} has {value!r} in the column {self.label!r}: regression needs a "
                "finite number in every row. For names, use TextClassifier with TextClassificationData."
            )
        return float(value)
