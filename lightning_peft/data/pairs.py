"""Data for text embeddings: pairs of texts that belong together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.data.base import Example, TextDataModule


class TextPairData(TextDataModule):
    """Pairs of texts that should have similar embeddings: a question and its answer, a text and its paraphrase.

    The loss treats the other texts of a batch as negatives, so a batch should not contain two pairs that also match.

    Args:
        source: The path of a csv, tsv, json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        text: The column of texts; ``predict`` embeds these and needs no other.
        text_pair: The column of their partners.
        **options: ``tokenizer``, ``max_length``, ``batch_size``, ``predict`` and the others of :class:`TextDataModule`.
    """

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        text: str = "text",
        text_pair: str = "text_pair",
        **options: Any,
    ) -> None:
        super().__init__(source, validation=validation, test=test, **options)
        self.text, self.text_pair = text, text_pair
        self.columns, self.targets = (text, text_pair), (text_pair,)

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize the texts, and their partners except in ``predict``."""
        texts = self.tokenize([row[self.text] for row in rows], split)["input_ids"]
        if split == "predict":
            return [{"input_ids": ids} for ids in texts]
        pairs = self.tokenize([row[self.text_pair] for row in rows], split)["input_ids"]
        return [{"input_ids": ids, "pair": pair} for ids, pair in zip(texts, pairs)]

    def collate(self, examples: list[Example], split: str) -> dict[str, dict[str, Tensor]]:  # type: ignore[override]
        """``texts``, and except in ``predict`` ``pairs``: each ``input_ids`` and ``attention_mask``."""
        batch = {"texts": self.pad(examples)}
        if split != "predict":
            batch["pairs"] = self.pad([{"input_ids": example["pair"]} for example in examples])
        return batch
