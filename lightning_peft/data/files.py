"""The base class of DataModules over files in one folder per class: images, recordings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_peft.data.base import Example
from lightning_peft.data.labelled import LabelledData
from lightning_peft.data.labels import number_of, report_balance
from lightning_peft.data.sources import find_file
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset


class ClassFolderData(LabelledData):
    """Base class for files in one folder per class; the folders' names are the labels.

    A subclass sets ``suffixes`` and ``kind``, and implements :meth:`check_file` and ``collate``.
    """

    suffixes: ClassVar[frozenset[str]]
    kind: ClassVar[str]

    columns = ("file", "label")
    targets = ("label",)

    def brings_splits(self) -> bool:
        """False, because every split has its own folder."""
        return False

    def where(self, split: str) -> str:
        """The folder of a split."""
        return self.splits.get(split) or self.source

    def load(self, split: str) -> Dataset:
        """List the files of a split.

        Raises:
            FileNotFoundError: if the folder does not exist.
            InputError: if it has no folders of files.
        """
        import datasets

        folder = find_file(Path(self.where(split)).expanduser())
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in self.suffixes and p.is_file())
        if not found:
            raise InputError(f"{str(folder)!r} has no {self.kind} files ({', '.join(sorted(self.suffixes))}).")
        flat = [path for path in found if path.parent == folder]
        if split == "predict":
            return datasets.Dataset.from_list([{"file": str(path)} for path in found])
        if flat:
            raise InputError(
                f"{str(folder)!r} has {self.kind} files such as {flat[0].name!r} outside of a class's folder: put the "
                f"files of each class into a folder with its name, such as {folder.name}/cat/{flat[0].name}."
            )
        rows = [{"file": str(path), "label": path.relative_to(folder).parts[0]} for path in found]
        return datasets.Dataset.from_list(rows)

    def check(self, table: Dataset, split: str) -> None:
        """Check every file, and that the classes of every split occur in training."""
        labels = table["label"][:] if split != "predict" else []
        for row, label in enumerate(labels):
            number_of(label, self.numbers(), split, row)
        if split == "train":
            report_balance(labels, split)
        for path in table["file"][:]:
            try:
                self.check_file(Path(path))
            except InputError:
                raise
            except Exception as error:
                said = str(error).strip() or type(error).__name__
                raise InputError(
                    f"{path!r} is not a readable {self.kind} file: {said}. Replace or remove it."
                ) from error

    def check_file(self, path: Path) -> None:
        """Raise an error if the file cannot be used."""
        raise NotImplementedError

    def all_labels(self, table: Dataset, split: str) -> list[Any]:
        """The class of every file."""
        return table["label"][:]

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """The path of each file, and the number of its class except in ``predict``."""
        if split == "predict":
            return [{"file": row["file"]} for row in rows]
        numbers = self.numbers()
        return [{"file": r["file"], "label": number_of(r["label"], numbers, split, i)} for i, r in enumerate(rows)]

    def prediction_inputs(self) -> Iterable[dict[str, Any]]:
        """The path of each file."""
        return ({"file": path} for path in self.table("predict")["file"][:])
