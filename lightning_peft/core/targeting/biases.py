"""Find the biases of a model by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from lightning_peft.core.names import leaf, owner_of
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.packed import is_packed

__all__ = ["bias_parameters", "buffer_biases", "is_bias_name"]

_NAME = re.compile(r"bias(es)?|bias_.+|.+_bias(es)?")


def is_bias_name(name: str) -> bool:
    """Whether ``name`` is that of a bias: ``bias``, ``in_proj_bias``, ``bias_ih_l0``, or an entry of ``biases``."""
    named = leaf(owner_of(name)) if leaf(name).isdigit() else leaf(name)
    return _NAME.fullmatch(named) is not None


def bias_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the biases of the base in model order: the owner's name, the parameter's name in it, and the parameter.

    A bias has one dimension or none, or one more for each expert that shares its parameter. Parameters of more
    dimensions are left out, such as ``bias_k`` and ``bias_v`` of an attention, which are tokens.
    """
    for owner, module in base_modules(model):
        for key, value in module._parameters.items():
            names = (key, leaf(owner)) if isinstance(module, nn.ParameterList | nn.ParameterDict) else (key,)
            if value is not None and any(map(_NAME.fullmatch, names)) and _fits(module, value):
                yield owner, key, value


def buffer_biases(model: nn.Module) -> list[str]:
    """The names of the quantised layers that store their bias as a buffer, as GPTQ does, so that it cannot train."""
    packed = ((name, module) for name, module in base_modules(model) if is_packed(module))
    return [name for name, module in packed if module._buffers.get("bias") is not None]


def _fits(module: nn.Module, value: nn.Parameter) -> bool:
    if value.ndim < 2:
        return True
    experts = (p for p in module._parameters.values() if p is not None and p.ndim == 3)
    return value.ndim == 2 and any(value.shape == (len(p), outputs) for p in experts for outputs in p.shape[1:])
