"""Every cell of the table in docs/quantised.md: a method trains on a quantised base as on the same base in float32, is
saved, loaded and merged; or it is refused when it is applied, with the reason.

GPTQ and AWQ layers share one protocol, which a layer of the same structure stands in for. quanto is tested if it is
installed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.targeting.packed import dequantized, is_packed
from tests.core.targeting.test_packed import GPTQLinear
from tests.features import Row
from tests.formats.models import llama, moved
from tests.helpers import close, differ, perturb
from tests.packed_methods import KINDS, METHODS, merges, refused
from tests.test_features import inputs

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


@functools.cache
def float_base(kind: str) -> nn.Module:
    torch.manual_seed(5)
    if kind == "llama":
        sizes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 1}
        return moved(llama(**sizes))
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)).eval()


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of the blocks, by name."""
    for name, module in list(model.named_modules()):
        if "layer" in name and (isinstance(module, nn.Linear) or is_packed(module)):
            yield name, module


def replace(model: nn.Module, make: Callable[[Any], nn.Module]) -> nn.Module:
    for name, layer in layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(layer))
    return model


def gptq(layer: nn.Linear) -> nn.Module:
    return GPTQLinear(layer.in_features, layer.out_features, layer.bias is not None)


@functools.cache
def quantised_base(kind: str, model: str) -> nn.Module:
    base = copy.deepcopy(float_base(model))
    if kind == "quanto":
        quanto = import_module("optimum.quanto")
        quanto.quantize(base, weights=quanto.qint8, include=["*layer*"])
        quanto.freeze(base)
    elif KINDS[kind] is None:
        replace(base, gptq)
    else:
        lp.apply(base, lp.QuantizeBase(**KINDS[kind]))
    return base


def quantised(kind: str, row: Row) -> nn.Module:
    if kind == "quanto":
        pytest.importorskip("optimum.quanto")
        model = quantised_base.__wrapped__(kind, row.base)  # its tensors cannot be copied
    else:
        model = copy.deepcopy(quantised_base(kind, row.base))
    assert all(is_packed(layer) for _, layer in layers(model))
    return model


def plain(layer: Any) -> nn.Module:
    """A float layer with the values of a quantised one."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight.data = dequantized(layer).float().clone()
    if layer.bias is not None:
        made.bias.data = layer.bias.detach().clone()
    return made


def reference(kind: str, row: Row) -> nn.Module:
    values = dict(layers(quantised_base(kind, row.base)))
    model = copy.deepcopy(float_base(row.base))
    for name, layer in layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain(values[name]))
        layer.eval()
    return model


def trained(model: nn.Module, row: Row, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a model with the method, and the gradients of what trains."""
    lp.apply(model, row.make())
    perturb(model)
    # bitsandbytes' int8 layers round their input in evaluation mode.
    y = model.train()(x).logits
    y.square().mean().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_quantised_base(name: str, kind: str, tmp_path: Path):
    row = METHODS[name]
    x, model = inputs(row), quantised(kind, row)
    if (why := refused(name, kind)) is not None:
        frozen = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(lp.TargetError, match=why):
            lp.apply(model, row.make())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen
        return
    y, gradients = trained(model, row, x)
    expected, others = trained(reference(kind, row), row, x)
    close(y, expected, 1e-4)
    differ(y, quantised(kind, row).train()(x).logits)
    assert {n for n, g in gradients.items() if g.any()} == {n for n, g in others.items() if g.any()} != set()
    for n, gradient in gradients.items():
        close(gradient, others[n], 1e-3)

    lp.save_adapter(model, tmp_path)
    again = quantised(kind, row)
    lp.load_adapter(again, tmp_path)
    close(again.train()(x).logits, y)

    if merges(name) is None:
        return
    with pytest.raises(lp.MergeError, match="has a quantised weight" if merges(name) else "does not change weights"):
        lp.merge(again)
    if merges(name):
        lp.merge(again, dequantize=True)
        close(again(x).logits, y, 1e-4)
        lp.unmerge(again)
        close(again(x).logits, y)
