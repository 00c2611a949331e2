"""Text and graph models: x-transformers and PyTorch Geometric."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from tests.integration.packages.case import Case
from tests.integration.packages.vision import of


def x_transformers() -> nn.Module:
    package = import_module("x_transformers")
    layers = package.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True)
    return package.TransformerWrapper(num_tokens=32, max_seq_len=16, attn_layers=layers)


def graph() -> tuple[Any, ...]:
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    return features, torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])


def geometric(name: str) -> Any:
    return of("torch_geometric.nn", name, in_channels=8, hidden_channels=16, num_layers=2, out_channels=5)


CASES = {
    "PyG GraphSAGE": Case("torch-geometric", geometric("GraphSAGE"), graph),
    "PyG GAT": Case("torch-geometric", geometric("GAT"), graph),
    "x-transformers TransformerWrapper": Case("x-transformers", x_transformers, lambda: (torch.arange(12).view(2, 6),)),
}
