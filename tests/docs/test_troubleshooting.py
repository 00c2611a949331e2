"""Every message in docs/troubleshooting.md is one that the package raises."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_message_is_in_the_source():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(messages) > 10
    source = "".join(path.read_text() for path in (ROOT / "lightning_peft").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may be written on several lines
    assert [message for message in messages if message not in joined] == []
