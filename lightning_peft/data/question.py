"""Data for extractive question answering: the answer is a part of the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset


class QuestionAnsweringData(TextDataModule):
    """Questions with a context that contains the answer, as in SQuAD.

    Args:
        source: The path of a csv, tsv, json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        question: The column of questions.
        context: The column of contexts; the end of a long one is cut.
        answer: The column of answers: texts that occur in the context (the first occurrence counts), or SQuAD's
            ``{"text": [...], "answer_start": [...]}``. An empty answer means that the context does not contain the
            answer.
        max_length: The maximum number of tokens of a question and its context.
        **options: ``tokenizer``, ``batch_size``, ``predict`` and the others of :class:`TextDataModule`.
    """

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        question: str = "question",
        context: str = "context",
        answer: str = "answers",
        max_length: int = 384,
        **options: Any,
    ) -> None:
        super().__init__(source, validation=validation, test=test, max_length=max_length, **options)
        self.question, self.context, self.answer = question, context, answer
        self.columns, self.targets = (question, context, answer), (answer,)

    def check(self, table: Dataset, split: str) -> None:
        """Check that every answer occurs in its context."""
        if split != "predict":
            for row, (value, context) in enumerate(zip(table[self.answer][:], table[self.context][:])):
                self.span(value, context, split, row)

    def span(self, value: Any, context: str, split: str, row: int) -> tuple[str, int]:
        """An answer and the character at which it starts; ``("", -1)`` if there is none.

        Raises:
            InputError: if the context does not contain the answer.
        """
        if isinstance(value, Mapping):
            texts, starts = value.get("text") or [""], value.get("answer_start") or [-1]
            text, start = texts[0], starts[0]
        else:
            text = "" if value is None else str(value)
            start = str(context).find(text)
        if not text:
            return "", -1
        if start < 0 or context[start : start + len(text)] != text:
            raise InputError(f"row {row} of {self.where(split)!r}: the answer {text[:60]!r} is not in the context.")
        return text, start

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize questions with their contexts; ``offsets`` locate each token of the context in it."""
        tokens = self.tokenize(
            [row[self.question] for row in rows],
            split,
            text_pair=[row[self.context] for row in rows],
            truncation="only_second",
            return_offsets_mapping=True,
        )
        examples = []
        for i, row in enumerate(rows):
            inside = tokens.sequence_ids(i)
            offsets = [list(o) if s == 1 else [-1, -1] for o, s in zip(tokens["offset_mapping"][i], inside)]
            example: Example = {name: tokens[name][i] for name in ("input_ids", "token_type_ids") if name in tokens}
            example |= {"offsets": offsets, "context": row[self.context]}
            if split != "predict":
                text, start = self.span(row[self.answer], row[self.context], split, i)
                covered = [at for at, (a, b) in enumerate(offsets) if a < start + len(text) and b > start >= 0 <= a]
                whole = covered and offsets[covered[-1]][1] >= start + len(text)
                example |= {"answer": text, "label": [covered[0], covered[-1]] if whole else [0, 0]}
            examples.append(example)
        return examples

    def collate(self, examples: list[Example], split: str) -> dict[str, Any]:
        """``input_ids`` and ``attention_mask``, ``(batch, longest)``; ``offsets`` and ``contexts``, lists.

        Except in ``predict``, also ``labels``, ``(batch, 2)``, the first and the last token of each answer, and
        ``answers``, a list of texts. If the context does not contain the answer, both are the first token.
        """
        batch: dict[str, Any] = self.pad(examples)
        batch |= {"offsets": [e["offsets"] for e in examples], "contexts": [e["context"] for e in examples]}
        if split != "predict":
            batch |= {
                "labels": torch.tensor([e["label"] for e in examples]),
                "answers": [e["answer"] for e in examples],
            }
        return batch
