"""The script runs, both libraries compute the same from one file, and every operation is in the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is beside the package, not in it

pytest.importorskip("peft")
pytest.importorskip("transformers")

from benchmarks import adapters


def test_script_runs(tmp_path):
    page = tmp_path / "results" / "page.md"
    assert adapters.main(["--size", "tiny", "--repeats", "1", "--rank", "2", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert all(f"| {operation} |" in text for operation in adapters.OPERATIONS)
    assert "After unmerging with ours the base is unchanged." in text
