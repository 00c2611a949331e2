"""Small models of every kind whose adapters are exchanged with PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp


def llama(**options: Any) -> nn.Module:
    """Two layers with grouped-query attention."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})).eval()


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 7))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def adapted(base: nn.Module, *methods: lp.PEFTMethod) -> nn.Module:
    """A copy of ``base`` with ``methods`` whose parameters have moved."""
    model = copy.deepcopy(base)
    lp.apply(model, *methods)
    return moved(model)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def read_by_peft(base: nn.Module, directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory).eval()


def made_by_peft(base: nn.Module, config: peft.PeftConfig, directory: Path) -> nn.Module:
    """An adapter of PEFT's with trained-looking values, saved in ``directory``."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    moved(model).save_pretrained(directory)
    return model


class Wrapped(L.LightningModule):
    """A LightningModule that calls the model it holds ``net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Called(L.LightningModule):
    """The same with another name, and a module that holds nothing beside it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Any:
        return self.model(x)
