"""Tiny models of three layers or more, one for each way in which a model can use a weight."""

from __future__ import annotations

import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_peft as lp


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.mid = nn.Linear(12, 10, bias=False)
        self.down = nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))))


class Normed(MLP):
    """Layers under weight norm: by a parametrization, and by a hook."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.up)
        nn.utils.parametrizations.weight_norm(self.down, dim=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(self.mid)


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


class Reads(nn.Module):
    """A block that reads the weights of its layers and computes without calling them, as Swin and Mamba do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.conv = nn.Conv1d(6, 6, 3, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.up.weight, self.up.bias))
        x = x + h @ self.down.weight.t() + self.down.bias
        x = x + F.conv1d(x.mT, self.conv.weight, self.conv.bias, padding=1, groups=self.conv.groups).mT
        return self.head(torch.tanh(x))


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
    """A linear layer that overrides forward (equalised learning rate)."""

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


class Recurrent(nn.Module):
    """One recurrent layer of each kind, with layers, directions, projections and dropout between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, proj_size=3, batch_first=True)
        self.gru = nn.GRU(6, 4, batch_first=True)
        self.rnn = nn.RNN(4, 5, bias=False, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lstm, self.gru, self.rnn):
            x, _ = layer(x)
        return self.head(x)


class Cells(nn.Module):
    """Cells of each kind, run step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(6, 5)
        self.gru = nn.GRUCell(5, 4)
        self.rnn = nn.RNNCell(4, 5, bias=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        lstm = gru = rnn = None
        for step in x.unbind(1):
            lstm = self.lstm(step, lstm)
            gru = self.gru(lstm[0], gru)
            rnn = self.rnn(gru, rnn)
        return self.head(rnn)


class Projection(nn.Module):
    """A linear layer that does not derive from ``nn.Linear``, as PyTorch Geometric's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@partial(lp.register_linear, transposed=True)
class Product(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.register_parameter("bias", nn.Parameter(torch.randn(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class OtherLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Projection(6, 12)
        self.mid = Product(12, 10)
        self.down = Product(10, 8, bias=False)
        self.head = Projection(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))))


class Logits(nn.Module):
    """A Hugging Face model that gives its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits
