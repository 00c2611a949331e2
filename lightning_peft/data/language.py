"""Data for language modelling, causal or masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.data.packing import collate_packs, pack
from lightning_peft.data.sources import load_table
from lightning_peft.pretrained import InputError

if TYPE_CHECKING:
    from datasets import Dataset


class LanguageModelData(TextDataModule):
    """Texts for language modelling: one text per example, or joined and cut into blocks of equal length.

    Args:
        source: ``"demo"`` (trains on the pretraining passages), the path of a txt, csv, tsv, json, jsonl or
            parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        text: The column of texts.
        mask: The fraction of tokens to mask, for a masked language model (0.15 for BERT); ``None`` creates labels for
            a causal one. Of the selected tokens, 80% become the mask token, 10% a random one, and 10% do not change.
        block_size: Join the training texts, including special tokens, and cut them into blocks of this many tokens. The
            rest is dropped. ``None`` keeps one text per example. Other splits are never joined.
        packing: Put several texts into one training example of ``max_length`` tokens. Unlike the texts of a block, they
            do not attend to one another.
        tokenizer: A model's folder or hub id; ``None`` uses the tokenizer of the module being trained.
        batch_size: Examples per batch and process.
        max_length: Longer texts are cut to this many tokens.
        num_workers: Worker processes per loader.
        adapter_column: The column that names each row's adapter; an empty value selects the base alone. Batches then
            contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.
        **options: ``predict``, ``validation_fraction`` and ``group_by_length``, as for :class:`TextDataModule`.
    """

    def __init__(
        self,
        source: str = "demo",
        validation: str | None = None,
        test: str | None = None,
        text: str = "text",
        mask: float | None = None,
        block_size: int | None = None,
        tokenizer: str | None = None,
        batch_size: int = 32,
        max_length: int = 128,
        num_workers: int = 0,
        adapter_column: str | None = None,
        packing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            source,
            tokenizer,
            max_length,
            validation=validation,
            test=test,
            batch_size=batch_size,
            num_workers=num_workers,
            adapter_column=adapter_column,
            **options,
        )
        if mask is not None and not 0 < mask < 1:
            raise InputError(f"mask={mask}: it is the fraction of tokens to mask and must be between 0 and 1.")
        if block_size is not None and block_size < 2:
            raise InputError(f"block_size={block_size}: it must be at least 2 tokens.")
        if packing and (mask is not None or block_size is not None):
            raise InputError(
                "packing=True is for causal models, and replaces block_size: pass only one of mask, "
                "block_size and packing."
            )
        self.columns, self.packing = (text,), packing
        self.text, self.mask, self.block_size = text, mask, block_size

    def setup(self, stage: str | None = None) -> None:
        """Load the tokenizer.

        Raises:
            InputError: if ``mask`` is set, but the tokenizer has no mask token.
        """
        super().setup(stage)
        if self.mask is not None and self.tokenizer.mask_token_id is None:
            raise InputError(
                f"mask={self.mask}, but the tokenizer has no mask token: pass mask=None for a causal model."
            )

    def load(self, split: str) -> Dataset:
        """Read a split. For the demo, the training rows are the pretraining passages."""
        return load_table("demo", "pretrain") if self.source == "demo" and split == "train" else super().load(split)

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize texts, and join them into blocks if ``block_size`` is set."""
        tokens = self.tokenize([row[self.text] for row in rows], split)["input_ids"]
        if split == "train" and self.block_size is not None:
            stream = [token for ids in tokens for token in ids]
            starts = range(0, len(stream) - self.block_size + 1, self.block_size)
            tokens = [stream[start : start + self.block_size] for start in starts]
            self.check_lengths([len(ids) for ids in tokens[:1]], split)
        if split == "train" and self.packing:
            return pack([{"input_ids": ids, "labels": ids} for ids in tokens], self.max_length)
        return [{"input_ids": ids} for ids in tokens]

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, longest)``; labels of -100 are ignored.

        Texts that a causal model should continue (``predict``) are padded on the left and have no labels.
        """
        if split == "predict" and self.mask is None:
            return self.pad(examples, "left")
        if "position_ids" in examples[0]:
            return collate_packs(examples, self.tokenizer.pad_token_id)
        batch = self.pad(examples)
        padding = batch["attention_mask"] == 0
        if self.mask is None:
            return {**batch, "labels": batch["input_ids"].masked_fill(padding, -100)}
        generator = None
        if split != "train":  # mask the same tokens each time a held-out text is evaluated
            generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
        ids, labels = self._hide(batch["input_ids"], self.mask, generator)
        return {**batch, "input_ids": ids, "labels": labels}

    def _hide(self, ids: Tensor, fraction: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        hidden = (torch.rand(ids.shape, generator=generator) < fraction) & ~special
        fate = torch.rand(ids.shape, generator=generator)
        random = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        seen = torch.where(hidden & (fate < 0.8), self.tokenizer.mask_token_id, ids)
        seen = torch.where(hidden & (fate >= 0.9), random, seen)
        return seen, ids.masked_fill(~hidden, -100)
