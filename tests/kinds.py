"""Layer kinds: the models of ``tests/models.py`` with their inputs, and the weights that a method must find in each.

Each model returns one tensor. ``matrices`` is written by hand from the layers' arguments, not computed by the code
under test: the shape (out, in) of every adapted weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.tiny import ViT
from tests.models import (
    MLP,
    Attention,
    Cells,
    Convolutions,
    Embeddings,
    Encoder,
    FusedQKV,
    Logits,
    MixtureLM,
    Normed,
    OtherLinear,
    Reads,
    Recurrent,
    ResNet,
    Scaled,
    TiedLM,
)


@dataclass(frozen=True)
class Kind:
    """One layer kind.

    Attributes:
        model: makes the model.
        inputs: makes the model's arguments.
        matrices: the shape of each adapted matrix by site name; the rows of the table use the first name in patterns.
        targets: what to adapt.
        fast_path: whether torch has a fused path for the model, which may round outputs differently.
        keys: the widths of keys and of values, of all attention layers together; 0 if they cannot be determined.
        tokens: the ``targets`` for a prompt, and the width of a token; None if no module takes a sequence.
        head: the name of the output head; None if it cannot be determined.
        last: the modules that train with the last block.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    matrices: dict[str, tuple[int, ...]]
    targets: list[str] | str = "all-linear"
    fast_path: bool = False
    keys: int = 0
    tokens: tuple[str, int] | None = None
    head: str | None = None
    last: tuple[str, ...] = ()

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
_VIT = {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.0": (32, 16), "mlp.2": (16, 32)}


def _layers(prefix: str, matrices: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{i}.{name}": shape for i in range(3) for name, shape in matrices.items()}


KINDS: dict[str, Kind] = {
    "linear": Kind(MLP, _noise(4, 5, 6), _MLP, head="head", last=("down", "head")),
    "linear_4d": Kind(MLP, _noise(2, 3, 2, 6), _MLP, head="head", last=("down", "head")),
    "other_linear": Kind(OtherLinear, _noise(2, 5, 6), _MLP, head="head", last=("down", "head")),
    "weight_norm": Kind(Normed, _noise(4, 5, 6), _MLP, head="head", last=("down", "head")),
    "fused_qkv": Kind(
        FusedQKV,
        _noise(2, 5, 8),
        {f"qkv.{i}": (24, 8) for i in range(3)},
        ["qkv.*"],
        head="head",
        last=("proj.2", "head"),
    ),
    "reads": Kind(
        Reads,
        _noise(3, 5, 6),
        {"up": (12, 6), "down": (6, 12), "conv": (6, 9)},
        ["up", "down", "conv"],
        head="head",
        last=("conv", "head"),
    ),
    "conv1d": Kind(
        lambda: Convolutions(
            nn.Conv1d(4, 8, 3, stride=2, padding=1),
            nn.Conv1d(8, 8, 3, dilation=2, groups=2),
            nn.Conv1d(8, 6, 1, bias=False),
        ),
        _noise(3, 4, 16),
        {"0": (8, 12), "2": (8, 12), "4": (6, 8)},
        ["type:Conv1d"],
        last=("4",),
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
        last=("4",),
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
        last=("4",),
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
        last=("4",),
    ),
    "conv_transpose": Kind(
        lambda: Convolutions(
            nn.ConvTranspose2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
            nn.ConvTranspose2d(8, 6, 3, groups=2, dilation=(2, 1), padding=1),
            nn.ConvTranspose2d(6, 4, (1, 3), stride=3, output_padding=(2, 1), bias=False),
        ),
        _noise(2, 3, 3, 4),
        {"0": (8, 18), "2": (6, 36), "4": (4, 18)},
        ["type:ConvTranspose2d"],
        last=("4",),
    ),
    "resnet": Kind(
        ResNet,
        _noise(3, 3, 6, 6),
        {"stem": (6, 27), "convs.0": (6, 54), "convs.1": (6, 54), "fc": (4, 6)},
        ["type:Conv2d", "fc"],
        head="fc",
        last=("norms.2", "fc"),
    ),
    "embedding": Kind(
        Embeddings,
        _ids(11),
        {"token": (6, 11), "position": (6, 5), "segment": (6, 2), "out": (4, 6)},
        ["type:Embedding", "out"],
        head="out",
        last=("segment", "out"),
    ),
    "tied": Kind(
        TiedLM,
        _ids(11),
        {"embed": (8, 11), "fc1": (8, 8), "fc2": (8, 8)},
        ["embed", "fc1", "fc2"],
        head="lm_head",
        last=("fc2", "lm_head"),
    ),
    "mha": Kind(
        lambda: Attention(False), _noise(5, 3, 8), _PACKED, fast_path=True, keys=3 * (8 + 8), last=("layers.2",)
    ),
    "mha_batch_first": Kind(
        lambda: Attention(True),
        _noise(3, 5, 8),
        _PACKED,
        ["type:MultiheadAttention"],
        fast_path=True,
        keys=3 * (8 + 8),
        last=("layers.2",),
    ),
    "mha_kdim": Kind(
        lambda: Attention(True, (6, 4)),
        lambda: (torch.randn(3, 5, 8), torch.randn(3, 4, 6), torch.randn(3, 4, 4)),
        _layers("layers", _UNEQUAL),
        fast_path=True,
        keys=3 * (8 + 8),
        last=("layers.2",),
    ),
    "encoder": Kind(
        Encoder,
        _padded,
        _layers("encoder.layers", _ENCODER),
        fast_path=True,
        keys=3 * (8 + 8),
        tokens=("encoder", 8),
        last=("encoder.layers.2",),
    ),
    "experts": Kind(
        MixtureLM,
        _noise(2, 5, 6),
        _layers("blocks", {"table": (5, 6), "up_proj": (3, 8, 6), "down_proj": (3, 6, 8)}),
        ["table", "up_proj", "down_proj"],
        last=("blocks.2",),
    ),
    "recurrent": Kind(
        Recurrent,
        _noise(3, 4, 6),
        {
            **{
                f"lstm.weight_{w}_l{layer}{way}": shape
                for layer in range(2)
                for way in ("", "_reverse")
                for w, shape in {"ih": (20, 6), "hh": (20, 3), "hr": (3, 5)}.items()
            },
            "gru.weight_ih_l0": (12, 6),
            "gru.weight_hh_l0": (12, 4),
            "rnn.weight_ih_l0": (5, 4),
            "rnn.weight_hh_l0": (5, 5),
        },
        fast_path=True,  # without a gradient
        head="head",
        last=("rnn", "head"),
    ),
    "cells": Kind(
        Cells,
        _noise(3, 4, 6),
        {
            "lstm.weight_ih": (20, 6),
            "lstm.weight_hh": (20, 5),
            "gru.weight_ih": (12, 5),
            "gru.weight_hh": (12, 4),
            "rnn.weight_ih": (5, 4),
            "rnn.weight_hh": (5, 5),
        },
        head="head",
        last=("rnn", "head"),
    ),
    "scaled": Kind(
        Scaled,
        _ids(7),
        {"embed": (6, 7), "fc1": (8, 6), "fc2": (6, 8)},
        ["embed", "fc1", "fc2"],
        head="head",
        last=("fc2", "head"),
    ),
    "llama": Kind(
        _llama,
        _ids(13),
        _layers("model.model.layers", _LLAMA),
        keys=3 * (8 + 8),
        tokens=("inputs", 16),
        head="model.lm_head",
        last=("model.model.layers.2", "model.model.norm", "model.lm_head"),
    ),
    "gpt2": Kind(
        _gpt2,
        _ids(13),
        _layers("model.transformer.h", _GPT2),
        keys=3 * (16 + 16),
        tokens=("inputs", 16),
        head="model.lm_head",
        last=("model.transformer.h.2", "model.transformer.ln_f", "model.lm_head"),
    ),
    "vit": Kind(
        ViT,
        _noise(2, 3, 16, 16),
        _layers("blocks", _VIT),
        keys=3 * (16 + 16),
        head="head",
        last=("blocks.2", "norm", "head"),
    ),
}
