"""The embedded default: a small corpus and a tiny pretrained transformer, so that everything runs offline.

Both are made by this project from Python's documentation; ``README.md`` in this folder is their card.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A Hugging Face folder: a masked language model (ModernBERT's architecture) with its tokenizer."""

CORPUS = Path(__file__).parent / "corpus"
"""``labels.json`` and the splits, as xz-compressed JSON lines."""

SPLITS = ("pretrain", "train", "validation", "test")


def load(split: str) -> list[dict[str, str]]:
    """Read one split of the demo corpus.

    Args:
        split: ``"pretrain"`` (text only), ``"train"``, ``"validation"`` or ``"test"`` (text, label and page).

    Returns:
        One dictionary per passage, in a fixed order.

    Raises:
        ValueError: There is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"the demo corpus has no split {split!r}; it has {', '.join(SPLITS)}.")
    with lzma.open(CORPUS / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def labels() -> dict[str, str]:
    """The classes, in the model's order: short name -> title of the chapter of the library reference."""
    return json.loads((CORPUS / "labels.json").read_text(encoding="utf-8"))
