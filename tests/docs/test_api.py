"""The API reference lists every public name."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_peft as lp


def test_the_reference_lists_every_public_name_once():
    listed = re.findall(
        r"^::: lightning_peft\.(\w+)$", (Path(__file__).parents[2] / "docs" / "api.md").read_text(), re.M
    )
    assert sorted(listed) == sorted(lp.__all__)
