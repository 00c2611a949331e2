"""Data for causal language models: prompts and the texts that should follow them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lightning_peft.data.base import Example, TextDataModule
from lightning_peft.data.packing import collate_packs, pack
from lightning_peft.pretrained import InputError


class GenerationData(TextDataModule):
    """Prompts with their targets. Only the target and its end-of-text token contribute to the loss.

    An example consists of the prompt's tokens, the target's tokens and the end-of-text token. If it is longer than
    ``max_length``, the beginning of the prompt is cut first, then the end of the target.

    Args:
        source: The path of a txt, csv, tsv, json, jsonl or parquet file, or the id of a hub dataset.
        validation: If ``source`` is a file: another file. For a hub dataset: the split's name, if not ``"validation"``.
        test: The same for the test split.
        prompt: The column of prompts.
        target: The column of targets.
        separator: The text between prompt and target, if both are in one column (a line of a txt file). A row is split
            at its first separator, ``prompt`` names the column, and ``target`` is not read.
        template: The format of the prompt for the model; ``"{prompt}"`` is replaced by the row's prompt. It may name
            columns instead: ``"{instruction}\\n{input}\\n"``. Empty cells become empty texts.
        packing: Put several examples into one training example of ``max_length`` tokens. They do not attend to one
            another, and no computation is spent on padding.
        tokenizer: A model's folder or hub id; ``None`` uses the tokenizer of the module being trained.
        batch_size: Examples per batch and process.
        max_length: The maximum number of tokens per example.
        num_workers: Worker processes per loader.
        adapter_column: The column that names each row's adapter; an empty value selects the base alone. Batches then
            contain ``"adapters"``, a list of names for :func:`lightning_peft.rows`.
        **options: ``predict``, ``validation_fraction`` and ``group_by_length``, as for :class:`TextDataModule`.

    Raises:
        InputError: if ``template`` does not contain ``{prompt}``, or a row does not contain ``separator``.

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
        self.fields = list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))
        if not self.fields:
            raise InputError(f"template={template!r} has no '{{prompt}}', so every prompt would be the same: add it.")
        if separator == "":
            raise InputError(
                "separator='' cannot separate a prompt from its target: pass None if they are two columns."
            )
        self.prompt, self.target, self.separator, self.template = prompt, target, separator, template
        self.packing = packing
        inputs = [prompt if field == "prompt" else field for field in self.fields]
        self.columns = (*inputs, target) if separator is None else (prompt,)
        self.targets = (target,) if separator is None else ()

    def prompts(self, rows: list[dict[str, Any]]) -> list[str]:
        """Return the formatted prompt of each row."""
        return [self._prompt(row) for row in rows]

    def _prompt(self, row: dict[str, Any]) -> str:
        prompt = self.template
        for field in self.fields:
            value = row[self.prompt if field == "prompt" else field]
            text = "" if value is None else str(value)
            if field == "prompt" and self.separator is not None:
                text = text.partition(self.separator)[0]
            prompt = prompt.replace(f"{{{field}}}", text.strip())
        return prompt

    def pairs(self, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        """Return the formatted prompt and the target of each row."""
        if self.separator is None:
            for index, row in enumerate(rows):
                for column in {self.prompt, self.target} & row.keys():
                    if row[column] is None:
                        raise InputError(f"row {index} has no text in the column {column!r}: fill or remove the row.")
            targets = [str(row[self.target]) for row in rows]
        else:
            parts = [row[self.prompt].partition(self.separator) for row in rows]
            for index, (text, found, _) in enumerate(parts):
                if not found:
                    raise InputError(f"row {index} has no separator {self.separator!r}: {text[:80]!r}")
            targets = [after for _, _, after in parts]
        return list(zip(self.prompts(rows), [target.strip() for target in targets]))

    def examples(self, rows: list[dict[str, Any]], split: str) -> list[Example]:
        """Tokenize pairs, or prompts alone in ``predict``. ``target`` is the number of predicted tokens at the end."""
        end = self.tokenizer.eos_token_id
        ends = [] if end is None else [end]
        pairs = [(prompt, "") for prompt in self.prompts(rows)] if split == "predict" else self.pairs(rows)
        prompts = self.tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        targets = self.tokenizer([target for _, target in pairs], add_special_tokens=False)["input_ids"]
        examples = []
        for before, after in zip(prompts, targets):
            if ends and before[-1:] == ends:  # some tokenizers add an end-of-text token to each text
                before = before[:-1]
            after = [] if split == "predict" else (after + ends)[: self.max_length]
            before = before[max(0, len(before) + len(after) - self.max_length) :]
            examples.append({"input_ids": before + after, "target": len(after)})
        self.check_lengths([len(example["input_ids"]) for example in examples], split)
        if not self.packing or split != "train":
            return examples
        unseen = [len(e["input_ids"]) - e["target"] for e in examples]
        labelled = [{**e, "labels": [-100] * n + e["input_ids"][n:]} for e, n in zip(examples, unseen)]
        return pack(labelled, self.max_length)

    def collate(self, examples: list[Example], split: str) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels``: ``(batch, longest)``; labels of -100 are ignored.

        In ``predict``, prompts are padded on the left and have no labels. Packed examples have ``position_ids`` and no
        mask.
        """
        if split == "predict":
            return self.pad(examples, "left")
        if "position_ids" in examples[0]:
            return collate_packs(examples, self.tokenizer.pad_token_id)
        batch = self.pad(examples)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[batch["attention_mask"].bool()] = torch.cat(
            [
                torch.tensor([-100] * (len(e["input_ids"]) - e["target"]) + e["input_ids"][-e["target"] :])
                for e in examples
            ]
        )
        return {**batch, "labels": labels}
