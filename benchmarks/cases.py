"""The models for the measurements: random weights, no downloads, base dropout off.

A case has a model, one batch, and the name of the first module of its frozen base. Batches are keyword arguments of the
model's ``forward``, whose output has a ``loss``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = ("tiny", "small", "large")


@dataclass(frozen=True)
class Case:
    """A model to measure.

    Attributes:
        model: the base, in training mode.
        batch: keyword arguments of ``model.forward``.
        entry: name of the module whose output is the first activation of the frozen base; the floor
            asks for its gradient, so that backward runs through every layer.
        head: modules whose names start with this are not targets.
        tokens: rows that a linear layer sees per step (positions of the input image for the conv net).
    """

    model: nn.Module
    batch: dict[str, Tensor]
    entry: str
    head: str
    tokens: int

    @property
    def targets(self) -> list[str]:
        """Qualified names of every linear layer and convolution outside the head."""
        layers = (nn.Linear, nn.Conv2d)
        named = self.model.named_modules()
        return [name for name, m in named if isinstance(m, layers) and not name.startswith(self.head)]

    @property
    def norms(self) -> list[str]:
        """Qualified names of the norm layers."""
        return [name for name, m in self.model.named_modules() if "Norm" in type(m).__name__]

    @property
    def keys_values(self) -> list[str]:
        """The targets that compute keys and values; all targets in a model without attention."""
        found = [name for name in self.targets if name.rpartition(".")[2] in ("k_proj", "v_proj", "key", "value")]
        return found or self.targets

    @property
    def feedforward(self) -> list[str]:
        """The second linear layer of each feed-forward, by qualified name."""
        return [name for name in self.targets if re.search(r"\.mlp\.down_proj$|\d\.output\.dense$", name)]


def llama(size: str) -> Case:
    """A causal decoder: grouped-query attention, SwiGLU, RMSNorm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, batch, length = {
        "tiny": (32, 64, 2, 2, 8),
        "small": (384, 1024, 4, 2, 256),
        "large": (2048, 5632, 8, 8, 1024),
    }[size]
    vocab = 64 if size == "tiny" else 2048
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // min(hidden // 2, 64),
        num_key_value_heads=hidden // min(hidden // 2, 64) // 2,
        vocab_size=vocab,
        use_cache=False,
    )
    ids = torch.randint(vocab, (batch, length))
    inputs = {"input_ids": ids, "labels": ids}
    return Case(LlamaForCausalLM(config), inputs, "model.embed_tokens", "lm_head", ids.numel())


def bert(size: str) -> Case:
    """An encoder with biases, GELU and LayerNorm, under a sequence classification head."""
    from transformers import BertConfig, BertForSequenceClassification

    hidden, layers, batch, length = {
        "tiny": (32, 2, 2, 8),
        "small": (256, 4, 8, 128),
        "large": (1024, 8, 32, 256),
    }[size]
    config = BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        vocab_size=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "labels": torch.randint(config.num_labels, (batch,))}
    model = BertForSequenceClassification(config)
    return Case(model, inputs, "bert.embeddings", "classifier", ids.numel())


def vit(size: str) -> Case:
    """A vision transformer: a patch embedding, a class token, pre-norm blocks."""
    from transformers import ViTConfig, ViTForImageClassification

    hidden, layers, batch, side = {
        "tiny": (32, 2, 2, 16),
        "small": (256, 4, 8, 64),
        "large": (1024, 8, 32, 224),
    }[size]
    config = ViTConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        image_size=side,
        patch_size=4 if side < 224 else 16,
        num_labels=10,
    )
    pixels, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    patches = (side // config.patch_size) ** 2
    model = ViTForImageClassification(config)
    return Case(model, {"pixel_values": pixels, "labels": labels}, "vit.embeddings", "classifier", batch * patches)


def resnet(size: str) -> Case:
    """Residual blocks of 3x3 convolutions and batch norm in three stages, with a stride of 2 between stages."""
    width, blocks, batch, side = {
        "tiny": (4, 1, 2, 8),
        "small": (32, 2, 16, 32),
        "large": (128, 3, 64, 64),
    }[size]
    model = ResNet(width, blocks)
    inputs = {"images": torch.randn(batch, 3, side, side), "labels": torch.randint(10, (batch,))}
    return Case(model, inputs, "image", "head", batch * side * side)


class ResNet(nn.Module):
    """A small residual network; ``forward`` returns an object with ``loss``, as transformers models do."""

    def __init__(self, width: int, blocks: int, classes: int = 10) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.image = nn.Identity()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        before = width
        for stage, after in enumerate(widths):
            for block in range(blocks):
                self.stages.append(Block(before, after, stride=2 if stage and not block else 1))
                before = after
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor, labels: Tensor) -> SimpleNamespace:
        features = self.stages(self.stem(self.image(images)))
        logits = self.head(features.mean((2, 3)))
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


CASES: dict[str, Callable[[str], Case]] = {"llama": llama, "bert": bert, "resnet": resnet, "vit": vit}


def build(name: str, size: str, device: torch.device, dtype: torch.dtype) -> Case:
    """Build a case with a fixed seed, so that every variant starts from the same weights and batch."""
    torch.manual_seed(0)
    case = CASES[name](size)
    case.model.to(device, dtype).train()
    for key, value in case.batch.items():
        case.batch[key] = value.to(device, dtype if value.is_floating_point() else None)
    return case
