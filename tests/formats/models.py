"""Small models whose adapters are exchanged with PEFT."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import lightning as L
import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lightning_peft as lp
from tests import helpers

#: two libraries add the same numbers in a different order
close = functools.partial(helpers.close, tolerance=1e-4)


def llama(**options: Any) -> nn.Module:
    """Two layers with grouped-query attention."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})).eval()


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 7))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def adapted(base: nn.Module, *methods: lp.PEFTMethod) -> nn.Module:
    """A copy of ``base`` with ``methods`` applied and random adapter values."""
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
    """A PEFT model with random adapter values, saved in ``directory``."""
    model = peft.get_peft_model(copy.deepcopy(base), config)
    moved(model).save_pretrained(directory)
    return model


class Wrapped(L.LightningModule):
    """A LightningModule that holds its model as ``net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Called(L.LightningModule):
    """Holds its model under another name, and has another module without parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def gpt2() -> nn.Module:
    """A model with transposed weights (``Conv1D``) and embeddings tied to the head."""
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def bert(num_labels: int = 3) -> nn.Module:
    """A classifier with biases in all layers."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    more = {"num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": num_labels, "initializer_range": 0.3}
    config = BertConfig(**sizes, **more)
    return BertForSequenceClassification(config).eval()


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, one with groups; an embedding; a name that is the end of
    another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), padding="same")
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
        self.conv3 = nn.Conv3d(1, 5, 2)
        self.head = nn.Linear(15, 7)
        self.inner = nn.Sequential()
        self.inner.add_module("head", nn.Linear(15, 15))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.emb(x).transpose(1, 2))
        h = self.grouped(self.conv2(h[:, None]).relu())
        h = self.conv3(h[:, None]).flatten(2).mean(1)
        return self.head(self.inner(h[:, :15]))


class Attention(nn.Module):
    """``nn.MultiheadAttention``, which reads the weights of its layers without calling them."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 12)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True, bias=bias)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        return self.fc(self.attn(h, h, h)[0])


class _Expert(nn.Module):
    """Two stacked weights and a plain one, all bare parameters."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        up, down = (12, 9) if transposed else (9, 12), (9, 12) if transposed else (12, 9)
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, *up) / 3)
        self.down = nn.Parameter(torch.randn(3, *down) / 3)
        self.gate = nn.Parameter(torch.randn(3, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        every = torch.stack([(x @ u).relu() @ d for u, d in zip(up, down)], -1)
        return (every * (x @ self.gate.t()).softmax(-1)[..., None, :]).sum(-1)


class Experts(nn.Module):
    """Bare parameters: experts stacked in three dimensions, stored either way."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(64, 12)
        self.layers = nn.ModuleList([_Expert(False), _Expert(True)])
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.fc(h)
