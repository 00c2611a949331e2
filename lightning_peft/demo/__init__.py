"""The embedded demo, a small corpus and a tiny pretrained transformer, so that everything runs offline.

This project built both from Python's documentation; ``README.md`` in this folder describes them.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A Hugging Face folder: a masked language model (ModernBERT's architecture) with its tokenizer."""

CORPUS = Path(__file__).parent / "corpus"
"""The folder of ``labels.json`` and the splits, which are xz-compressed JSON lines."""

SPLITS = ("pretrain", "train", "validation", "test")


def load(split: str) -> list[dict[str, str]]:
    """Read one split of the demo corpus.

    Args:
        split: ``"pretrain"`` (text only), ``"train"``, ``"validation"`` or ``"test"`` (text, label and page).

    Returns:
        One dictionary per passage, in a fixed order.

    Raises:
        ValueError: if the split does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"the demo corpus has no split {split!r}; it has {', '.join(SPLITS)}.")
    with lzma.open(CORPUS / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def labels() -> dict[str, str]:
    """Map each class's short name to its chapter of the library reference, in the order of the model's outputs."""
    return json.loads((CORPUS / "labels.json").read_text(encoding="utf-8"))
