"""Run by test_other_peft.py in a separate process, with another release of PEFT on the path.

Reads every adapter in ``<folder>/ours`` onto the base of its name and writes the logits; makes further adapters in
``<folder>/theirs``, with their logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import peft
import torch

from tests.formats import models

MADE = {
    "llama": {"target_modules": ["q_proj", "down_proj"], "r": 4, "rank_pattern": {"q_proj": 2}},
    "gpt2": {"target_modules": ["c_attn"], "use_rslora": True, "bias": "lora_only"},
    "bert": {"target_modules": ["query"], "task_type": "SEQ_CLS", "use_dora": True},
    "Convolutions": {"target_modules": ["conv1", "conv2", "emb"]},
    "Attention": {"target_modules": ["attn", "fc"]},
}


def base(name: str) -> torch.nn.Module:
    torch.manual_seed(5)
    return getattr(models, name)().eval()


def tokens() -> torch.Tensor:
    torch.manual_seed(6)
    return models.tokens()


def main(folder: Path) -> None:
    for directory in sorted((folder / "ours").iterdir()):
        model = peft.PeftModel.from_pretrained(base(directory.name.partition("-")[0]), directory).eval()
        torch.save(models.logits(model, tokens()), directory / "logits.pt")
    for name, options in MADE.items():
        models.made_by_peft(base(name), peft.LoraConfig(**options), folder / "theirs" / name)
        # Compare with what PEFT reads back, because releases before 0.21 lose the biases of lora_only when they save.
        model = models.read_by_peft(base(name), folder / "theirs" / name)
        torch.save(models.logits(model, tokens()), folder / "theirs" / name / "logits.pt")


if __name__ == "__main__":
    print("peft", peft.__version__)
    main(Path(sys.argv[1]))
