"""Data for text classification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft import demo
from lightning_peft.core.names import nearest
from lightning_peft.data.base import Example, TextDataModule


class TextClassificationData(TextDataModule):
    """Texts with one label each.

    Labels may be names or numbers. They are numbered in sorted order; the demo's labels are in the order of its model's
    configuration. After ``setup``, ``labels`` lists them.

    Args:
        source: ``"demo"``, the path of a csv, tsv, json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split, which ``predict`` also uses.
        text: The column of texts.
        label: The column of labels.
        tokenizer: A model's folder or hub id; ``None`` uses the tokenizer of the module being trained.
        batch_size: Texts per batch and process.
        max_length: Longer texts are cut to this many tokens.
        num_workers: Worker processes per loader.
        adapter_column: The column that names each row's adapter; an empty value selects the base alone. Batches then
            contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.

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
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        num_workers: int = 0,
        adapter_column: str | None = None,
    ) -> None:
        super().__init__(source, validation, test, tokenizer, batch_size, max_length, num_workers, adapter_column)
        self.text, self.label = text, label
        self.columns = (text, label)
        self.labels: list[Any] = []
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer and find the labels."""
        super().setup(stage)
        if not self.labels:
            if self.source == "demo":
                self.labels = list(demo.labels())
            else:
                self.labels = sorted({row[self.label] for row in self.rows("train")})

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize texts and number their labels.

        Raises:
            ValueError: A label does not occur in the training split.
        """
        number = {label: index for index, label in enumerate(self.labels)}
        for row in rows:
            if row[self.label] not in number:
                names = [str(label) for label in self.labels]
                near = nearest(str(row[self.label]), names, n=1)
                hint = f"; the closest label is {near[0]!r}" if near else ""
                raise ValueError(
                    f"the {split} split contains label {row[self.label]!r}, which never occurs in training{hint}."
                )
        tokens = self.tokenizer([row[self.text] for row in rows], truncation=True, max_length=self.max_length)
        return [{"input_ids": ids, "label": number[row[self.label]]} for ids, row in zip(tokens["input_ids"], rows)]

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, ``(batch, longest)``, and ``labels``, ``(batch,)``."""
        return {**self.pad(examples), "labels": torch.tensor([example["label"] for example in examples])}
