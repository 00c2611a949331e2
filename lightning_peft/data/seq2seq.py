"""Data for models with an encoder and a decoder: texts and the texts to write for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_peft.data.base import Example
from lightning_peft.data.generation import GenerationData


class SequenceToSequenceData(GenerationData):
    """Texts with the texts that T5, BART or a similar model should write for them: summaries, translations.

    The arguments are those of :class:`GenerationData`: ``prompt`` and ``target`` name the columns, ``template`` may add
    an instruction that the model expects (``"summarize: {prompt}"``). Both texts are cut to ``max_length`` tokens.

    Example::

        SequenceToSequenceData("news.csv", prompt="article", target="summary", template="summarize: {prompt}")
    """

    objective = "seq2seq"

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize the texts for the encoder, and except in ``predict`` the ``labels`` for the decoder."""
        prompts = self.prompts(rows) if split == "predict" else [prompt for prompt, _ in self.pairs(rows)]
        ids = self.tokenize(prompts, split)["input_ids"]
        if split == "predict":
            return [{"input_ids": of_row} for of_row in ids]
        targets = self.tokenizer(
            text_target=[target for _, target in self.pairs(rows)], truncation=True, max_length=self.max_length
        )["input_ids"]
        return [{"input_ids": of_row, "labels": labels} for of_row, labels in zip(ids, targets)]

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, ``(batch, longest)``, and ``labels``, ``(batch, longest target)``."""
        if split == "predict":
            return self.pad(examples)
        from transformers import DataCollatorForSeq2Seq

        names = ("input_ids", "labels")
        return dict(DataCollatorForSeq2Seq(self.tokenizer)([{name: e[name] for name in names} for e in examples]))
