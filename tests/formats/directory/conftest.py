"""A small adapter and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_peft.formats.directory.files import write_files

KEY = "base_model.model.layer.0.lora_A.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["layer.0"]}


def tensors() -> dict[str, torch.Tensor]:
    return {KEY: torch.arange(6.0).view(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_files(tmp_path / "adapter", CONFIG, tensors(), {"lightning_peft": '{"a": 1}'}, "# Card")
    return tmp_path / "adapter"
