"""The part of a DataModule that finds the labels, numbers them, and checks those of every split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.base import TableDataModule
from lightning_peft.data.labels import find_labels, in_order_of, label_name

if TYPE_CHECKING:
    from datasets import Dataset


class LabelledData(TableDataModule):
    """Mixin for a DataModule whose rows have labels; list it before the other base class.

    Labels may be names or numbers, and are numbered in sorted order. A subclass implements :meth:`all_labels`.

    Attributes:
        labels: The labels in the order of their numbers, after ``setup``.
        multi_label: Whether a row may have several labels.
    """

    labels: Sequence[Any] = ()
    multi_label: bool = False
    _numbers: dict[str, int] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the labels (those that the module names, or else those of the training split), and check every split.

        Raises:
            InputError: if there is only one label, a row has none, or a split has one that never occurs in training.
        """
        if not len(self.labels) and stage != "predict":
            named = getattr(self.module, "hparams", {}).get("labels")
            if named:
                self.labels, self.multi_label = list(named), self.module.multi_label
            else:
                self.labels = in_order_of(self.find_labels(), getattr(self.module, "labels", ()))
        super().setup(stage)

    def find_labels(self) -> list[Any]:
        """The labels of the training split, before rows of it are set aside for validation."""
        splits = ("train", "validation") if self.validation_fraction else ("train",)
        values = [value for split in splits for value in self.all_labels(self.table(split), split)]
        return find_labels(values, self.targets[0], self.source)

    def all_labels(self, table: Dataset, split: str) -> list[Any]:
        """Every label of a split, as often as it occurs."""
        raise NotImplementedError

    def numbers(self) -> dict[str, int]:
        """Map each label's name to its number."""
        if len(self._numbers) != len(self.labels):
            self._numbers = {label_name(label): number for number, label in enumerate(self.labels)}
        return self._numbers

    def named(self, value: Any, column: str) -> Any:
        """The name of a label that a hub dataset stores as a number; any other value unchanged."""
        feature = self._tables["train"].features[column] if "train" in self._tables else None
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return names[value] if names is not None and isinstance(value, int) else value

    def _prepared_with(self) -> str:
        return f"{super()._prepared_with()} {self.labels}"
