"""Pack several texts into one training example, in which they do not attend to one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_peft.data.base import Example


def pack(examples: Sequence[Example], size: int) -> list[Example]:
    """Put texts one after another into examples of at most ``size`` tokens.

    ``position_ids`` start from 0 at each text. Without an attention mask, transformers then lets each text attend to
    itself alone; :class:`lightning_peft.tasks.LanguageModel` checks this on the first batch.

    Args:
        examples: Texts with ``input_ids`` and ``labels`` (-100 for tokens that are not predicted).
        size: The maximum number of tokens.
    """
    packs: list[Example] = []
    for example in examples:
        ids = example["input_ids"][:size]
        labels = [-100, *example["labels"][1:size]]  # nothing predicts the first token of a text
        if not packs or len(packs[-1]["input_ids"]) + len(ids) > size:
            packs.append({"input_ids": [], "labels": [], "position_ids": []})
        for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", list(range(len(ids))))):
            packs[-1][name] += values
    return packs


def collate_packs(packs: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``position_ids``, ``(batch, longest)``.

    Each padding token counts as a separate text, so no real token attends to it.
    """
    fill = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0}
    return {
        name: pad_sequence([torch.tensor(pack[name]) for pack in packs], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
