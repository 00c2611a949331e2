"""Data for causal language models: prompts and the texts that should follow them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.base import Example, TextDataModule


class GenerationData(TextDataModule):
    """Prompts with their targets. Only the target and its end-of-text token contribute to the loss.

    An example consists of the prompt's tokens, the target's tokens and the end-of-text token. If it is longer than
    ``max_length``, the beginning of the prompt is cut first, then the end of the target.

    Args:
        source: The path of a txt, csv, tsv, json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split, which ``predict`` also uses.
        prompt: The column of prompts.
        target: The column of targets.
        separator: The text between prompt and target, if both are in one column (a line of a txt file). A row is split
            at its first separator, ``prompt`` names the column, and ``target`` is not read.
        template: The format of the prompt for the model; ``"{prompt}"`` is replaced by the row's prompt.
        tokenizer: A model's folder or hub id; ``None`` uses the tokenizer of the module being trained.
        batch_size: Examples per batch and process.
        max_length: The maximum number of tokens per example.
        num_workers: Worker processes per loader.
        adapter_column: The column that names each row's adapter; an empty value selects the base alone. Batches then
            contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.

    Raises:
        ValueError: ``template`` does not contain ``{prompt}``, or a row does not contain ``separator``.

    Example::

        data = GenerationData("e2e.txt", prompt="text", separator="||", template="{prompt} ||")
    """

    objective = "causal"

    def __init__(
        self,
        source: str,
        validation: str | None = None,
        test: str | None = None,
        prompt: str = "prompt",
        target: str = "target",
        separator: str | None = None,
        template: str = "{prompt}",
        tokenizer: str | None = None,
        batch_size: int = 16,
        max_length: int = 256,
        num_workers: int = 0,
        adapter_column: str | None = None,
    ) -> None:
        super().__init__(source, validation, test, tokenizer, batch_size, max_length, num_workers, adapter_column)
        if "{prompt}" not in template:
            raise ValueError(f"template={template!r} has no '{{prompt}}', so every prompt would be the same: add it.")
        if separator == "":
            raise ValueError("separator='' separates nothing: pass None if prompt and target are two columns.")
        self.prompt, self.target, self.separator, self.template = prompt, target, separator, template
        self.columns = (prompt, target) if separator is None else (prompt,)
        self.save_hyperparameters()

    def pairs(self, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Return the formatted prompt and the target of each row."""
        if self.separator is None:
            texts = [(row[self.prompt], row[self.target]) for row in rows]
        else:
            parts = [row[self.prompt].partition(self.separator) for row in rows]
            for index, (text, found, _) in enumerate(parts):
                if not found:
                    raise ValueError(f"row {index} has no separator {self.separator!r}: {text[:80]!r}")
            texts = [(before, after) for before, _, after in parts]
        return [(self.template.replace("{prompt}", before.strip()), after.strip()) for before, after in texts]

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize pairs. ``target`` is the number of predicted tokens at the end of an example."""
        pairs = self.pairs(rows)
        end = self.tokenizer.eos_token_id
        ends = [] if end is None else [end]
        prompts = self.tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        targets = self.tokenizer([target for _, target in pairs], add_special_tokens=False)["input_ids"]
        examples = []
        for before, after in zip(prompts, targets):
            before = (
                before[:-1] if before[-1:] == ends and ends else before
            )  # some tokenizers add an end-of-text token to each text
            after = (after + ends)[: self.max_length]
            before = before[max(0, len(before) + len(after) - self.max_length) :]
            examples.append({"input_ids": before + after, "target": len(after)})
        return examples

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, longest)``; labels of -100 are ignored."""
        batch = self.pad(examples)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[batch["attention_mask"].bool()] = torch.cat(
            [
                torch.tensor([-100] * (len(e["input_ids"]) - e["target"]) + e["input_ids"][-e["target"] :])
                for e in examples
            ]
        )
        return {**batch, "labels": labels}
