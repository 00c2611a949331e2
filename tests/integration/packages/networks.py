"""Text, graph and point models: x-transformers, PyTorch Geometric, sentence-transformers and e3nn."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

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


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "good", "bad"]


@cache
def bert() -> str:
    """A folder with a tiny BERT and its tokenizer."""
    import transformers

    folder = mkdtemp()
    (Path(folder) / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **size)
    with torch.random.fork_rng():  # the caller's seed makes the same module with and without this call
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder


class Sentences(nn.Module):
    """Calls a SentenceTransformer with tensors instead of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        package = import_module("sentence_transformers")
        parts = import_module("sentence_transformers.models")
        body = parts.Transformer(bert(), model_args={"add_pooling_layer": False})
        self.model = package.SentenceTransformer(modules=[body, parts.Pooling(16), parts.Dense(16, 8)], device="cpu")

    def forward(self, ids: Tensor) -> Tensor:
        return self.model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]


class Equivariant(nn.Module):
    """Scalars and vectors through two linear layers and a gate of e3nn."""

    def __init__(self) -> None:
        super().__init__()
        o3 = import_module("e3nn.o3")
        self.first = o3.Linear("4x0e + 4x1o", "8x0e + 4x1o")
        self.product = o3.FullyConnectedTensorProduct("8x0e + 4x1o", "1x0e + 1x1o", "8x0e")
        self.mix = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, edge: Tensor) -> Tensor:
        return self.mix(self.product(self.first(x), edge))


def points() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(6, 16, generator=made), torch.randn(6, 4, generator=made)


CASES = {
    "PyG GraphSAGE": Case("torch-geometric", geometric("GraphSAGE"), graph),
    "PyG GAT": Case("torch-geometric", geometric("GAT"), graph),
    "sentence-transformers SentenceTransformer": Case(
        "sentence-transformers", Sentences, lambda: (torch.tensor([[2, 5, 6, 3], [2, 8, 9, 3]]),)
    ),
    "e3nn FullyConnectedTensorProduct": Case("e3nn", Equivariant, points),
    "x-transformers TransformerWrapper": Case("x-transformers", x_transformers, lambda: (torch.arange(12).view(2, 6),)),
}
