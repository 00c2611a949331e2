"""The base classes of the DataModules: splits and their checks, tokenization, loaders with dynamic padding."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_peft.data.sources import check_columns, is_file, load_table
from lightning_peft.pretrained import InputError, load_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

Example = dict[str, Any]

#: the splits that each stage of a Trainer reads; a fit also checks the columns and labels of the test split
_STAGES = {
    "fit": ("train", "validation", "test"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}

#: arguments that choose rows or batches, but do not change the example that a row becomes
_WITHOUT_EFFECT = frozenset(
    {"source", "validation", "test", "predict", "validation_fraction", "batch_size", "num_workers", "group_by_length"}
)


class TableDataModule(L.LightningDataModule):
    """Reads tables, checks them before training, and serves batches. The base class of the DataModules.

    A subclass sets ``columns`` and ``targets``, and implements :meth:`examples` and :meth:`collate`.

    The training loader shuffles from torch's global generator, so ``seed_everything`` fixes the order.

    Args:
        source: ``"demo"``, the path of a csv, tsv, json, jsonl, parquet or txt file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        predict: The same for the split to predict, whose rows need no label; ``None`` uses the test split.
        validation_fraction: Without ``validation``, validate on this fraction of the training rows and train on the
            rest. The choice is random but always the same.
        batch_size: Examples per batch and process.
        num_workers: Worker processes per loader.
        adapter_column: The column that names each row's adapter; an empty value selects the base alone. Batches then
            contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.
    """

    columns: tuple[str, ...]
    """The columns to read; each subclass sets them."""

    targets: tuple[str, ...] = ()
    """The members of ``columns`` that hold labels or other targets; ``predict`` does not need them."""

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        validation_fraction: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 0,
        adapter_column: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: it must be at least 1.")
        if not 0 <= validation_fraction < 1:
            raise InputError(f"validation_fraction={validation_fraction}: it must be at least 0 and below 1.")
        if validation_fraction and validation is not None:
            raise InputError("validation and validation_fraction both choose the validation rows: pass one of them.")
        self.source = source
        self.splits = {"validation": validation, "test": test, "predict": predict}
        self.validation_fraction = validation_fraction
        self.batch_size, self.num_workers = batch_size, num_workers
        self.adapter_column = adapter_column
        self._tables: dict[str, Dataset] = {}
        self._examples: dict[str, Dataset] = {}
        self.save_hyperparameters()

    @property
    def module(self) -> Any:
        """The Trainer's module, or None."""
        return getattr(self.trainer, "lightning_module", None)

    def setup(self, stage: str | None = None) -> None:
        """Read and check every split of the stage, so that bad data is refused before training.

        Raises:
            FileNotFoundError: if a file does not exist.
            InputError: if a split is empty, or a column or a value in it is not usable.
        """
        # The Trainer passes a member of an enumeration, which equals a string but does not hash as one.
        for split in next((splits for name, splits in _STAGES.items() if name == stage), ()):
            if self.has(split):
                self.check(self.table(split), split)
        for split in ("train", "validation") if stage == "fit" else ():
            if self.has(split):
                self.prepared(split)

    def check(self, table: Dataset, split: str) -> None:
        """Check the values of a split; subclasses extend it.

        Raises:
            InputError: if a column or a value in it is not usable.
        """

    def train_dataloader(self) -> DataLoader[Example]:
        """Shuffled batches of the training split."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Example] | list[Any]:
        """Batches of the validation split; an empty list if there is none."""
        return self._loader("validation") if self.has("validation") else []

    def test_dataloader(self) -> DataLoader[Example] | list[Any]:
        """Batches of the test split; an empty list if there is none."""
        return self._loader("test") if self.has("test") else []

    def predict_dataloader(self) -> DataLoader[Example] | list[Any]:
        """Batches of the rows to predict, in their order.

        Raises:
            InputError: if there are no rows to predict.
        """
        if not self.has("predict"):
            raise InputError("there is nothing to predict: pass predict=, a file of rows (--data.predict=new.csv).")
        return self._loader("predict")

    def has(self, split: str) -> bool:
        """Whether the split exists."""
        if split == "predict":
            return self.splits["predict"] is not None or self.has("test")
        if split == "train" or (split == "validation" and self.validation_fraction > 0):
            return True
        return self.brings_splits() or self.splits[split] is not None

    def brings_splits(self) -> bool:
        """Whether the source itself has a validation and a test split, as the demo and datasets of the hub do."""
        return not is_file(self.source)

    def where(self, split: str) -> str:
        """The file or dataset that a split is read from, for messages."""
        wanted = self.splits.get(split)
        return self.source if wanted is None or not is_file(self.source) else wanted

    def table(self, split: str) -> Dataset:
        """Return a split with all of its columns, after checking that none of the needed columns is missing.

        Raises:
            FileNotFoundError: if the file does not exist.
            InputError: if the split cannot be read, is empty, or lacks a column.
        """
        if split == "predict" and self.splits["predict"] is None:
            split, needed = "test", "predict"
        else:
            needed = split
        if split not in self._tables:
            self._read(split)
        table = self._tables[split]
        check_columns(table.column_names, self._needed(needed), self.where(split), split)
        return table

    def prediction_inputs(self) -> Iterable[dict[str, Any]]:
        """The rows to predict with all of their columns, in order."""
        return self.table("predict")

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Return the rows of a split, unchanged from the source, with the columns that are needed."""
        return [dict(row) for row in self.table(split).select_columns(self._needed(split))]

    def examples(self, rows: list[dict[str, Any]], split: str) -> Sequence[Example]:
        """Turn rows into dictionaries with the entries that :meth:`collate` needs."""
        raise NotImplementedError

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """Make a batch of examples."""
        raise NotImplementedError

    def prepared(self, split: str) -> Dataset:
        """The examples of a split, computed once. If the split is a file, a later run reads them from a cache."""
        if split not in self._examples:
            table = self.table(split).select_columns(self._needed(split))
            # map would give an entry the type of a column with the same name, so the columns get unique names.
            renamed = table.rename_columns({name: f"source {name}" for name in table.column_names})
            self._examples[split] = renamed.map(
                self._prepare,
                batched=True,
                batch_size=len(table),  # an example may come from several rows (joined texts)
                fn_kwargs={"split": split},
                remove_columns=renamed.column_names,
                new_fingerprint=self._fingerprint(table, split),
                desc=f"prepare {split}",
            )
        return self._examples[split]

    def _needed(self, split: str) -> list[str]:
        columns = [name for name in self.columns if split != "predict" or name not in self.targets]
        return columns if self.adapter_column is None else [*columns, self.adapter_column]

    def _read(self, split: str) -> None:
        if split in ("train", "validation") and self.validation_fraction:
            whole = self.load("train")
            if len(whole) < 2:
                raise InputError(f"{self.source!r} has one row, so none is left for validation: add rows.")
            parts = whole.train_test_split(max(1, round(self.validation_fraction * len(whole))), seed=0)
            self._tables |= {"train": parts["train"], "validation": parts["test"]}
        else:
            self._tables[split] = self.load(split)

    def load(self, split: str) -> Dataset:
        """Read a split from its source."""
        wanted = self.splits.get(split)
        if is_file(self.source) and wanted is not None:
            return load_table(wanted, split)
        return load_table(self.source, wanted or split)

    def _prepare(self, columns: Mapping[str, list[Any]], split: str) -> dict[str, list[Any]]:
        names = [name.removeprefix("source ") for name in columns]
        rows = [dict(zip(names, values)) for values in zip(*columns.values())]
        examples = self.examples(rows, split)
        if self.adapter_column is not None:
            self._check_adapters(examples, rows)
            for example, row in zip(examples, rows):
                example["adapter"] = row[self.adapter_column] or None
        if not len(examples):
            raise InputError(f"the {split} split of {self.where(split)!r} gives no example: its rows are too short.")
        return {name: [example[name] for example in examples] for name in examples[0]}

    def _fingerprint(self, table: Dataset, split: str) -> str:
        """Return a hash of all that determines the examples: rows, preparing code and arguments."""
        from datasets.fingerprint import Hasher

        code = [text for c in type(self).__mro__ if issubclass(c, TableDataModule) and (text := _source(c))]  # type: ignore[arg-type]
        chosen = {name: value for name, value in self.hparams.items() if name not in _WITHOUT_EFFECT}
        arguments = json.dumps(chosen, default=str, sort_keys=True)
        return Hasher.hash([table._fingerprint, split, code, arguments, self._prepared_with()])

    def _prepared_with(self) -> str:
        """Further values that the examples depend on."""
        return ""

    def _check_adapters(self, examples: Sequence[Example], rows: list[dict[str, Any]]) -> None:
        if len(examples) != len(rows):
            raise InputError(
                f"adapter_column={self.adapter_column!r}, but {len(rows)} rows became {len(examples)} examples, which "
                "may contain texts of several adapters: pass block_size=None or packing=False."
            )
        for i, row in enumerate(rows):
            if not isinstance(row[self.adapter_column], str | None):  # type: ignore[index]
                raise InputError(
                    f"row {i} has {row[self.adapter_column]!r} in the column {self.adapter_column!r}: it must name an "  # type: ignore[index]
                    "adapter, or be empty for the base alone."
                )

    def sampler(self, split: str) -> Sampler[int] | None:
        """A sampler for the split; None shuffles the training split and keeps the order of the others."""
        return None

    def _loader(self, split: str) -> DataLoader[Example]:
        sampler = self.sampler(split)
        return DataLoader(
            self.prepared(split),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=split == "train" if sampler is None else None,
            sampler=sampler,
            collate_fn=_Collate(self, split),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class TextDataModule(TableDataModule):
    """Tokenizes rows once, and serves padded batches. The base class of the text DataModules.

    Args:
        source: The table, as for :class:`TableDataModule`.
        tokenizer: A model's folder or hub id; ``None`` uses the tokenizer of the module being trained.
        max_length: Longer texts are cut to this many tokens.
        group_by_length: Put texts of similar length into the same training batch, in random order, to save padding.
        **table: ``validation``, ``test``, ``predict``, ``validation_fraction``, ``batch_size``, ``num_workers`` and
            ``adapter_column``, as for :class:`TableDataModule`.
    """

    def __init__(
        self,
        source: str,
        tokenizer: str | None = None,
        max_length: int = 128,
        group_by_length: bool = False,
        **table: Any,
    ) -> None:
        super().__init__(source, **table)
        if max_length < 1:
            raise InputError(f"max_length={max_length}: it must be at least 1.")
        self.tokenizer_name = tokenizer
        self.max_length, self.group_by_length = max_length, group_by_length
        self.tokenizer: Any = None

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer (the requested one, or that of the Trainer's module), and check the splits.

        Raises:
            FileNotFoundError: if a file does not exist.
            InputError: if no tokenizer was requested and the module has no hyperparameter ``model``, or as for
                :meth:`TableDataModule.setup`.
        """
        self.load_tokenizer()
        super().setup(stage)

    def load_tokenizer(self) -> None:
        """Load the requested tokenizer or that of the Trainer's module, unless ``tokenizer`` is set already."""
        if self.tokenizer is not None:
            return
        model = self.tokenizer_name or getattr(self.module, "hparams", {}).get("model")
        if model is None and self.source == "demo":
            model = "demo"
        if not isinstance(model, str):
            raise InputError(
                f"{type(self).__name__} does not know which tokenizer to use: pass tokenizer=, a model's "
                "folder or hub id (the module has no hyperparameter 'model' to take it from)."
            )
        self.tokenizer = load_tokenizer(model)

    def tokenize(self, texts: Sequence[Any], split: str, **options: Any) -> Any:
        """Tokenize texts into transformers' ``BatchEncoding``, cut to ``max_length``.

        Raises:
            InputError: if a row has no text, or the model has fewer positions than a text has tokens.
        """
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"row {i} of {self.where(split)!r} has {text!r} instead of a text: fill or remove it.")
        tokens = self.tokenizer(list(texts), **{"truncation": True, "max_length": self.max_length, **options})
        self.check_lengths([len(ids) for ids in tokens["input_ids"]], split)
        return tokens

    def check_lengths(self, lengths: Sequence[int], split: str) -> None:
        """Refuse examples with more tokens than the module's network has positions.

        Raises:
            InputError: if there are any; the message names the row and the ``max_length`` to pass.
        """
        positions = getattr(self.module, "max_positions", None)
        if positions is not None and max(lengths, default=0) > positions:
            row = next(i for i, length in enumerate(lengths) if length > positions)
            raise InputError(
                f"row {row} of {self.where(split)!r} has {lengths[row]} tokens, but the model has {positions} "
                f"positions: pass max_length={positions} or less to {type(self).__name__}."
            )

    def pad(self, examples: list[Example], side: str | None = None) -> dict[str, Tensor]:
        """Pad to ``input_ids`` and ``attention_mask``, both ``(batch, longest)``, as the tokenizer does."""
        names = ("input_ids", "token_type_ids")
        fields = [{name: example[name] for name in names if name in example} for example in examples]
        return dict(self.tokenizer.pad(fields, return_tensors="pt", padding_side=side))

    def sampler(self, split: str) -> Sampler[int] | None:
        """Batches of similar lengths if ``group_by_length`` is set."""
        if split != "train" or not self.group_by_length:
            return None
        from transformers.trainer_pt_utils import LengthGroupedSampler

        lengths = [len(ids) for ids in self.prepared(split)["input_ids"]]
        return LengthGroupedSampler(self.batch_size, lengths=lengths)

    def _prepared_with(self) -> str:
        return self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else repr(self.tokenizer)


class _Collate:
    """``TableDataModule.collate`` for one split; it can be pickled for worker processes without the Trainer."""

    def __init__(self, data: TableDataModule, split: str) -> None:
        self.data, self.split = data, split

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = self.data.collate(examples, self.split)
        if self.data.adapter_column is not None:
            batch["adapters"] = [example["adapter"] for example in examples]
        return batch


@functools.cache  # reading a class parses its whole file, which takes longer than reading a small table from the cache
def _source(kind: type) -> str | None:
    """The source code of a class; None for one that is defined in an interactive session, which has no file."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return None
