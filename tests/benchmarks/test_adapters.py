"""The script runs, both libraries give the same outputs from one adapter file, and the table has every operation."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not installed with the package

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import adapters


def test_script_runs(tmp_path):
    page = tmp_path / "results" / "page.md"
    assert adapters.main(["--size", "tiny", "--repeats", "1", "--rank", "2", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert all(f"| {operation} |" in text for operation in adapters.OPERATIONS)
    assert "After unmerging with ours the base is unchanged." in text
