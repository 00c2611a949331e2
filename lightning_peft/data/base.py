"""The base class of the text DataModules: splits, the tokenizer, loaders with dynamic padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.data.sources import is_file, load_rows
from lightning_peft.pretrained import load_tokenizer

Example = dict[str, Any]


class TextDataModule(L.LightningDataModule):
    """Read rows, tokenize them once, and serve padded batches. The base class of the text DataModules.

    The training loader shuffles from torch's global generator, so ``seed_everything`` fixes the order.
    """

    columns: tuple[str, ...]
    """The columns to read; each subclass sets them."""

    def __init__(
        self,
        source: str,
        validation: str | None,
        test: str | None,
        tokenizer: str | None,
        batch_size: int,
        max_length: int,
        num_workers: int,
        adapter_column: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        self.source = source
        self.splits = {"validation": validation, "test": test}
        self.tokenizer_name = tokenizer
        self.batch_size, self.max_length, self.num_workers = batch_size, max_length, num_workers
        self.adapter_column = adapter_column
        self.tokenizer: Any = None
        self._examples: dict[str, Sequence[Example]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer: the requested one, or that of the Trainer's module.

        Raises:
            ValueError: No tokenizer was requested, and the module has no hyperparameter ``model``.
        """
        if self.tokenizer is not None:
            return
        module = getattr(self.trainer, "lightning_module", None)
        model = self.tokenizer_name or getattr(module, "hparams", {}).get("model")
        if model is None and self.source == "demo":
            model = "demo"
        if not isinstance(model, str):
            raise ValueError(
                f"{type(self).__name__} does not know which tokenizer to use: pass tokenizer=, a model's "
                "folder or hub id (the module has no hyperparameter 'model' to take it from)."
            )
        self.tokenizer = load_tokenizer(model)

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches of the training split."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Example] | list[Any]:
        """Batches of the validation split; an empty list if there is none."""
        return self._loader("validation") if self._has("validation") else []

    def test_dataloader(self) -> DataLoader[Example] | list[Any]:
        """Batches of the test split; an empty list if there is none."""
        return self._loader("test") if self._has("test") else []

    def predict_dataloader(self) -> DataLoader[Example] | list[Any]:
        """The test split's batches."""
        return self.test_dataloader()

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of ``"train"``, ``"validation"`` or ``"test"``, unchanged from the source."""
        wanted = self.splits.get(split)
        columns = self.columns if self.adapter_column is None else (*self.columns, self.adapter_column)
        if is_file(self.source) and wanted is not None:
            return load_rows(wanted, split, columns)
        return load_rows(self.source, wanted or split, columns)

    def examples(self, rows: list[dict[str, Any]], split: str) -> Sequence[Example]:
        """Tokenize rows into dictionaries with ``input_ids`` and the other entries that ``collate`` needs."""
        raise NotImplementedError

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """Make a batch of examples."""
        raise NotImplementedError

    def pad(self, examples: list[Example]) -> dict[str, Tensor]:
        """Pad to ``input_ids`` and ``attention_mask``, both ``(batch, longest)``, as the tokenizer does."""
        fields = [{"input_ids": example["input_ids"]} for example in examples]
        return dict(self.tokenizer.pad(fields, return_tensors="pt"))

    def _has(self, split: str) -> bool:
        return not is_file(self.source) or self.splits[split] is not None

    def _check_rows(self, examples: Sequence[Example], rows: list[dict[str, Any]]) -> None:
        if len(examples) != len(rows):
            raise ValueError(
                f"adapter_column={self.adapter_column!r}, but {len(rows)} rows became {len(examples)} examples, which "
                "may contain texts of several adapters: pass block_size=None."
            )
        for i, row in enumerate(rows):
            if not isinstance(row[self.adapter_column], str | None):  # type: ignore[index]
                raise ValueError(
                    f"row {i} has {row[self.adapter_column]!r} in the column {self.adapter_column!r}: it must name an "  # type: ignore[index]
                    "adapter, or be empty for the base alone."
                )

    def _loader(self, split: str) -> DataLoader[Example]:
        if split not in self._examples:
            rows = self.rows(split)
            examples = self.examples(rows, split)
            if self.adapter_column is not None:
                self._check_rows(examples, rows)
                for example, row in zip(examples, rows):
                    example["adapter"] = row[self.adapter_column] or None
            self._examples[split] = examples
        return DataLoader(
            self._examples[split],  # type: ignore[arg-type]  # a sequence is a map-style dataset
            batch_size=self.batch_size,
            shuffle=split == "train",
            collate_fn=_Collate(self, split),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class _Collate:
    """``TextDataModule.collate`` for one split; it can be pickled for worker processes without the Trainer."""

    def __init__(self, data: TextDataModule, split: str) -> None:
        self.data, self.split = data, split

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = self.data.collate(examples, self.split)
        if self.data.adapter_column is not None:
            batch["adapters"] = [example["adapter"] for example in examples]
        return batch
