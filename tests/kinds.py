"""Layer kinds: tiny models of three layers or more, one for each way in which a weight can sit in a model.

Each model gives one tensor. ``matrices`` is written by hand: the matrix (out, in) that every adapted weight reads
as, from the layer's arguments and not from the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """One layer kind.

    Attributes:
        model: makes the model.
        inputs: makes the model's arguments.
        matrices: the adapted weights' matrices by site name; the first is the one that patterns of a row name.
        targets: what to adapt.
        fast_path: whether torch has a fused path of its own here, so that equal outputs may round otherwise.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    matrices: dict[str, tuple[int, ...]]
    targets: list[str] | str = "all-linear"
    fast_path: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The model with weights from ``seed``, in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model().train()

    def batch(self, seed: int = 1) -> tuple[Any, ...]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs()

    @property
    def first(self) -> str:
        return next(iter(self.matrices))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.mid = nn.Linear(12, 10, bias=False)
        self.down = nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))))


class FusedQKV(nn.Module):
    """Attention whose query, key and value are one linear layer, as in ViT and GPT-NeoX."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for qkv, proj in zip(self.qkv, self.proj):
            q, k, v = qkv(x).chunk(3, dim=-1)
            x = x + proj(F.scaled_dot_product_attention(q, k, v))
        return self.head(x)


class Convolutions(nn.Sequential):
    """Convolutions with a smooth function after each."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*[part for layer in layers for part in (layer, nn.Tanh())])


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norms[0](self.stem(x)))
        for conv, norm in zip(self.convs, list(self.norms)[1:]):
            x = x + torch.tanh(norm(conv(x)))
        return self.fc(x.mean((2, 3)))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 6, padding_idx=0)
        self.position = nn.Embedding(5, 6)
        self.segment = nn.Embedding(2, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[-1], device=ids.device)
        return self.out(torch.tanh(self.token(ids) + self.position(places) + self.segment(ids % 2)))


class TiedLM(nn.Module):
    """A language model whose head is its embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.fc2(torch.tanh(self.fc1(self.embed(ids))))))


class Attention(nn.Module):
    """Three ``nn.MultiheadAttention`` in a row; ``memory`` is the width of keys and values."""

    def __init__(self, batch_first: bool, memory: tuple[int, int] | None = None) -> None:
        super().__init__()
        kdim, vdim = memory or (None, None)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=batch_first) for _ in range(3)
        )
        for layer in self.layers:
            nn.init.normal_(layer.in_proj_bias, std=0.2)
            nn.init.normal_(layer.out_proj.bias, std=0.2)

    def forward(self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            y, _ = layer(x, x if key is None else key, x if value is None else value, need_weights=i == 0)
            x = x + y
        return x


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with key padding: in eval mode it has a fast path that skips its children."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)
        for parameter in self.encoder.parameters():
            nn.init.normal_(parameter, std=0.3)  # its layers start as copies of one another

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0.0)


class Experts(nn.Module):
    """Stacked experts as bare 3-D parameters, and a bare 2-D position table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 6))
        self.up_proj = nn.Parameter(torch.randn(3, 8, 6) / 3)
        self.down_proj = nn.Parameter(torch.randn(3, 6, 8) / 3)
        self.router = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table
        h = torch.tanh(torch.einsum("bti,eoi->bteo", x, self.up_proj))
        y = torch.einsum("bteo,eio->btei", h, self.down_proj)
        return (self.router(x).softmax(-1)[..., None] * y).sum(-2)


class MixtureLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class ScaledLinear(nn.Linear):
    """A linear layer with a forward of its own (equalised learning rate)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight / math.sqrt(self.in_features), self.bias) * 2


class ScaledEmbedding(nn.Embedding):
    """An embedding that scales its rows, as Gemma's does."""

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(ids) * self.embedding_dim**0.5


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(7, 6)
        self.fc1 = ScaledLinear(6, 8)
        self.fc2 = ScaledLinear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(self.embed(ids))))))


class Logits(nn.Module):
    """A Hugging Face model that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attn_implementation="sdpa",
    )
    return Logits(LlamaForCausalLM(config))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=13, n_positions=16, n_embd=16, n_layer=3, n_head=2, **none)
    return Logits(GPT2LMHeadModel(config))


def _ids(vocabulary: int, length: int = 5) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, vocabulary, (3, length)),)


def _noise(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*shape),)


def _padded() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return torch.randn(3, 5, 8), padding


_MLP = {"up": (12, 6), "mid": (10, 12), "down": (8, 10)}
_PACKED = {
    k: v for i in range(3) for k, v in {f"layers.{i}.in_proj_weight": (24, 8), f"layers.{i}.out_proj": (8, 8)}.items()
}
_LLAMA = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
_GPT2 = {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (64, 16), "mlp.c_proj": (16, 64)}
_UNEQUAL = {"q_proj_weight": (8, 8), "k_proj_weight": (8, 6), "v_proj_weight": (8, 4), "out_proj": (8, 8)}
_ENCODER = {"self_attn.in_proj_weight": (24, 8), "self_attn.out_proj": (8, 8), "linear1": (12, 8), "linear2": (8, 12)}


def _layers(prefix: str, matrices: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{i}.{name}": shape for i in range(3) for name, shape in matrices.items()}


KINDS: dict[str, Kind] = {
    "linear": Kind(MLP, _noise(4, 5, 6), _MLP),
    "linear_4d": Kind(MLP, _noise(2, 3, 2, 6), _MLP),
    "fused_qkv": Kind(FusedQKV, _noise(2, 5, 8), {f"qkv.{i}": (24, 8) for i in range(3)}, ["qkv.*"]),
    "conv1d": Kind(
        lambda: Convolutions(
            nn.Conv1d(4, 8, 3, stride=2, padding=1),
            nn.Conv1d(8, 8, 3, dilation=2, groups=2),
            nn.Conv1d(8, 6, 1, bias=False),
        ),
        _noise(3, 4, 16),
        {"0": (8, 12), "2": (8, 12), "4": (6, 8)},
        ["type:Conv1d"],
    ),
    "conv2d": Kind(
        lambda: Convolutions(
            nn.Conv2d(3, 8, (3, 1), stride=(2, 1), padding=(1, 0)),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 4, (2, 3), dilation=(1, 2), padding="same"),
        ),
        _noise(2, 3, 8, 7),
        {"0": (8, 9), "2": (8, 9), "4": (4, 48)},
        ["type:Conv2d"],
    ),
    "conv2d_padded": Kind(
        lambda: Convolutions(
            nn.Conv2d(2, 6, 3, padding=2, padding_mode="reflect"),
            nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular", groups=3),
            nn.Conv2d(6, 4, (1, 3), padding=(0, 1), padding_mode="replicate", stride=2),
        ),
        _noise(2, 2, 6, 5),
        {"0": (6, 18), "2": (6, 18), "4": (4, 18)},
        ["type:Conv2d"],
    ),
    "conv3d": Kind(
        lambda: Convolutions(
            nn.Conv3d(2, 4, (1, 2, 2)),
            nn.Conv3d(4, 4, 2, groups=2, padding=1, stride=(1, 2, 1)),
            nn.Conv3d(4, 3, 1),
        ),
        _noise(2, 2, 3, 4, 4),
        {"0": (4, 8), "2": (4, 16), "4": (3, 4)},
        ["type:Conv3d"],
    ),
    "resnet": Kind(
        ResNet,
        _noise(3, 3, 6, 6),
        {"stem": (6, 27), "convs.0": (6, 54), "convs.1": (6, 54), "fc": (4, 6)},
        ["type:Conv2d", "fc"],
    ),
    "embedding": Kind(
        Embeddings,
        _ids(11),
        {"token": (6, 11), "position": (6, 5), "segment": (6, 2), "out": (4, 6)},
        ["type:Embedding", "out"],
    ),
    "tied": Kind(TiedLM, _ids(11), {"embed": (8, 11), "fc1": (8, 8), "fc2": (8, 8)}, ["embed", "fc1", "fc2"]),
    "mha": Kind(lambda: Attention(False), _noise(5, 3, 8), _PACKED, fast_path=True),
    "mha_batch_first": Kind(
        lambda: Attention(True), _noise(3, 5, 8), _PACKED, ["type:MultiheadAttention"], fast_path=True
    ),
    "mha_kdim": Kind(
        lambda: Attention(True, (6, 4)),
        lambda: (torch.randn(3, 5, 8), torch.randn(3, 4, 6), torch.randn(3, 4, 4)),
        _layers("layers", _UNEQUAL),
        fast_path=True,
    ),
    "encoder": Kind(Encoder, _padded, _layers("encoder.layers", _ENCODER), fast_path=True),
    "experts": Kind(
        MixtureLM,
        _noise(2, 5, 6),
        _layers("blocks", {"table": (5, 6), "up_proj": (3, 8, 6), "down_proj": (3, 6, 8)}),
        ["table", "up_proj", "down_proj"],
    ),
    "scaled": Kind(Scaled, _ids(7), {"embed": (6, 7), "fc1": (8, 6), "fc2": (6, 8)}, ["embed", "fc1", "fc2"]),
    "llama": Kind(_llama, _ids(13), _layers("model.model.layers", _LLAMA)),
    "gpt2": Kind(_gpt2, _ids(13), _layers("model.transformer.h", _GPT2)),
}
