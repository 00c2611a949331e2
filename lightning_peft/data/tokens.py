"""Data for labelling the words of a text: named entities, parts of speech, slots."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.data.labelled import LabelledData
from lightning_peft.data.labels import label_values, number_of, report_balance
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset


class TokenClassificationData(LabelledData, TextDataModule):
    """Texts with a label for each word.

    The words and the labels of a row are lists (jsonl, parquet, hub datasets), or texts separated by spaces (csv). The
    first token of each word gets the word's label; the others are ignored.

    Args:
        source: The path of a csv, tsv, json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        tokens: The column of words.
        tags: The column of labels, one per word.
        **options: ``tokenizer``, ``max_length``, ``batch_size``, ``predict`` and the others of :class:`TextDataModule`.

    Example::

        TokenClassificationData("slots.jsonl", tokens="words", tags="slots", validation_fraction=0.1)
    """

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        tokens: str = "tokens",
        tags: str = "tags",
        **options: Any,
    ) -> None:
        super().__init__(source, validation=validation, test=test, **options)
        self.tokens, self.tags = tokens, tags
        self.columns, self.targets = (tokens, tags), (tags,)

    def check(self, table: Dataset, split: str) -> None:
        """Check that every row has as many labels as words, and that the labels occur in training."""
        words = [self.words(value, split, row) for row, value in enumerate(table[self.tokens][:])]
        if split == "predict":
            return
        values = self.label_lists(table, split)
        for row, (of_row, labels) in enumerate(zip(words, values)):
            if len(of_row) != len(labels):
                raise InputError(
                    f"row {row} of {self.where(split)!r} has {len(of_row)} words in {self.tokens!r} but {len(labels)} "
                    f"labels in {self.tags!r}: give one label per word."
                )
            for label in labels:
                number_of(label, self.numbers(), split, row)
        if split == "train":
            report_balance(list(chain(*values)), split)

    def words(self, value: Any, split: str, row: int) -> list[str]:
        """The words of a row, as a list.

        Raises:
            InputError: if there are none.
        """
        words = value.split() if isinstance(value, str) else value
        if not words or not all(isinstance(word, str) for word in words):
            raise InputError(f"row {row} of {self.where(split)!r} has {value!r} in {self.tokens!r} instead of words.")
        return words

    def label_lists(self, table: Dataset, split: str) -> list[list[Any]]:
        """The labels of each row."""
        values = label_values(table, self.tags, self.where(split))
        return [value.split() if isinstance(value, str) else list(value) for value in values]

    def all_labels(self, table: Dataset, split: str) -> list[Any]:
        """The label of every word of a split."""
        return list(chain(*self.label_lists(table, split)))

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize words. ``labels`` holds the number of each word's label at its first token, and -100 elsewhere."""
        words = [self.words(row[self.tokens], split, i) for i, row in enumerate(rows)]
        tokens = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
        self.check_lengths([len(ids) for ids in tokens["input_ids"]], split)
        examples = []
        for i, row in enumerate(rows):
            of_token = tokens.word_ids(i)
            first = [w if w is not None and w not in of_token[:at] else None for at, w in enumerate(of_token)]
            if split == "predict":  # keep the words, including those cut off, because predictions are written per word
                starts = [of_token.index(word) if word in of_token else -1 for word in range(len(words[i]))]
                examples.append({"input_ids": tokens["input_ids"][i], "starts": starts})
                continue
            tags = row[self.tags].split() if isinstance(row[self.tags], str) else row[self.tags]
            numbers = [number_of(self.named(tag, self.tags), self.numbers(), split, i) for tag in tags]
            labels = [-100 if word is None else numbers[word] for word in first]
            examples.append({"input_ids": tokens["input_ids"][i], "labels": labels})
        return examples

    def collate(self, examples: list[Example], split: str) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``labels``, ``(batch, longest)``; labels of -100 are ignored.

        In ``predict``, ``starts`` lists the first token of each word instead, -1 for a word that was cut.
        """
        if split == "predict":
            return {**self.pad(examples), "starts": [example["starts"] for example in examples]}
        from transformers import DataCollatorForTokenClassification

        fields = [{name: example[name] for name in ("input_ids", "labels")} for example in examples]
        batch: dict[str, Tensor] = dict(DataCollatorForTokenClassification(self.tokenizer)(fields))
        return batch
