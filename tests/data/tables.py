"""Tiny tables for the tests of tasks, data and predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

POLITE = ["please open the file", "thank you for the list", "please sort the words", "thank you and goodbye"]
RUDE = ["open it now", "give me the list", "sort the words at once", "go away"]


def write(path: str, rows: list[dict[str, Any]]) -> str:
    """Write rows to a .csv or .jsonl file."""
    with Path(path).open("w", newline="") as file:
        if path.endswith("jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(Path(path).absolute())


def requests(path: str = "requests.csv", labels: tuple[str, str] = ("polite", "rude")) -> str:
    """Eight texts of two classes."""
    rows = [{"text": text, "label": label} for texts, label in zip((POLITE, RUDE), labels) for text in texts]
    return write(path, rows)


def read(path: str) -> list[dict[str, str]]:
    """The rows of a .csv file, as text."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))
