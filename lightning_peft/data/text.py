"""Data for classifying texts and pairs of texts, and for regression on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft import demo
from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.data.labels import find_labels, in_order_of, label_name, label_values, number_of, report_balance
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


class TextClassificationData(_TextsWithTargets):
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
        self.labels: list[Any] = []
        self.multi_label = label_separator is not None
        self._numbers: dict[str, int] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the labels: those that the module has, or those of the training split; then check every split."""
        if not self.labels and stage != "predict":
            named = getattr(self.module, "hparams", {}).get("labels")
            if self.source == "demo":
                self.labels = list(demo.labels())
            elif named:
                self.labels, self.multi_label = list(named), self.module.multi_label
            else:
                self.labels = in_order_of(self._find(), getattr(self.module, "labels", ()))
        super().setup(stage)

    def check(self, table: Dataset, split: str) -> None:
        """Check that every label occurs in training."""
        if split == "predict":
            return
        values = self._values(table, split)
        numbers = self._number_by_name()
        for i, value in enumerate(values):
            for part in value if isinstance(value, list) else [value]:
                number_of(part, numbers, split, i)
        if split == "train":
            report_balance(list(chain(*values)) if self.multi_label else values, split)

    def target(self, value: Any, split: str, row: int) -> Any:
        """A number, or 0 or 1 for each label if rows have several."""
        numbers = self._number_by_name()
        if not self.multi_label:
            return number_of(self._name(value), numbers, split, row)
        present = {number_of(part, numbers, split, row) for part in self._parts(value)}
        return [float(i in present) for i in range(len(numbers))]

    def _find(self) -> list[Any]:
        table = self.table("train")
        values = self._values(table, "train")
        self.multi_label = self.label_separator is not None or any(isinstance(value, list) for value in values)
        parts: Sequence[Any] = list(chain(*values)) if self.multi_label else values
        if self.validation_fraction:
            other = self._values(self.table("validation"), "validation")
            parts = [*parts, *(chain(*other) if self.multi_label else other)]
        return find_labels(parts, self.label, self.source)

    def _values(self, table: Dataset, split: str) -> list[Any]:
        if self.label_separator is None:
            return label_values(table, self.label, self.where(split))
        # In a file with several labels per row, an empty cell is a row without any.
        return [self._parts(value) for value in table[self.label][:]]

    def _parts(self, value: Any) -> list[Any]:
        if isinstance(value, list):
            return [self._name(part) for part in value]
        parts = str("" if value is None else value).split(self.label_separator)
        return [part.strip() for part in parts if part.strip()]

    def _name(self, value: Any) -> Any:
        feature = self._tables["train"].features[self.label] if "train" in self._tables else None
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return names[value] if names is not None and isinstance(value, int) else value

    def _number_by_name(self) -> dict[str, int]:
        if len(self._numbers) != len(self.labels):
            self._numbers = {label_name(label): index for index, label in enumerate(self.labels)}
        return self._numbers

    def _prepared_with(self) -> str:
        return f"{super()._prepared_with()} {self.labels}"


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
