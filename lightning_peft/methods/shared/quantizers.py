"""Quantise one linear layer in place with bitsandbytes or torchao, which are imported only here, when needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["check_options", "quantize_layer"]

#: the options of each kind, by backend; the first backend of a kind is the default
_OPTIONS: dict[str, dict[str, frozenset[str]]] = {
    "nf4": {"bitsandbytes": frozenset({"compress_statistics", "compute_dtype"})},
    "fp4": {"bitsandbytes": frozenset({"compress_statistics", "compute_dtype"})},
    "int8": {"bitsandbytes": frozenset({"threshold"}), "torchao": frozenset()},
    "int4": {"torchao": frozenset({"group_size"})},
    "float8": {"torchao": frozenset()},
}


def check_options(kind: str, backend: str, options: Mapping[str, Any]) -> None:
    """Check that a backend can quantise to ``kind`` with ``options``.

    Raises:
        ValueError: if it cannot.
    """
    known = _OPTIONS[kind]
    if backend not in ("auto", *known):
        raise ValueError(f"backend={backend!r} does not have kind={kind!r}; {' and '.join(known)} do")
    for name in options.keys() - known[_backend(kind, backend)]:
        allowed = ", ".join(sorted(known[_backend(kind, backend)])) or "none"
        raise ValueError(
            f"options: {_backend(kind, backend)} has no option {name!r} for kind={kind!r}; known: {allowed}"
        )
    if not isinstance(getattr(torch, str(options.get("compute_dtype", "float32")), None), torch.dtype):
        raise ValueError(f"compute_dtype must be the name of a dtype, got {options['compute_dtype']!r}")


def quantize_layer(layer: Any, kind: str, backend: str, options: Mapping[str, Any]) -> None:
    """Quantise the weight of an ``nn.Linear`` in place. The layer stays the same object and keeps its bias and hooks.

    Raises:
        ValueError: if the package of the backend is not installed.
    """
    name = _backend(kind, backend)
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"QuantizeBase(kind={kind!r}) needs {name}, which cannot be imported ({error}): pip install {name}"
        ) from error
    if name == "torchao":
        _torchao(layer, kind, options)
    else:
        _become(layer, _bitsandbytes(package, layer, kind, options))


def _backend(kind: str, backend: str) -> str:
    return next(iter(_OPTIONS[kind])) if backend == "auto" else backend


def _bitsandbytes(package: Any, layer: nn.Linear, kind: str, options: Mapping[str, Any]) -> Any:
    weight = layer.weight.detach()
    sizes = layer.in_features, layer.out_features
    with torch.device("meta"):
        if kind == "int8":
            made = package.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, **options)
            value = package.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            known = {**options, "compute_dtype": getattr(torch, options.get("compute_dtype", str(weight.dtype)[6:]))}
            made = package.nn.Linear4bit(*sizes, bias=False, quant_type=kind, **known)
            value = package.nn.Params4bit(
                weight,
                requires_grad=False,
                quant_type=kind,
                compress_statistics=options.get("compress_statistics", True),
                module=layer,
            )
    made._parameters["weight"] = value.to(weight.device)  # quantises
    made._parameters["bias"] = layer._parameters["bias"]
    return made


def _become(layer: nn.Module, made: nn.Module) -> None:
    """Turn ``layer`` into ``made``: other references to it, and its hooks, stay valid."""
    own = vars(layer)
    kept = {name: value for name, value in own.items() if "hooks" in name or name == "training"}
    own.update({**vars(made), **kept})
    layer.__class__ = type(made)


def _torchao(layer: nn.Module, kind: str, options: Mapping[str, Any]) -> None:
    from torchao import quantization as ao

    if kind == "int8":
        config = ao.Int8WeightOnlyConfig()
    elif kind == "float8":
        config = ao.Float8WeightOnlyConfig()
    else:
        groups = ao.PerGroup(options.get("group_size", 32))
        config = ao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009 - missing in torch's stubs
            granularity=groups,
        )
    before = layer._parameters["weight"]
    ao.quantize_(layer, config, filter_fn=lambda module, name: module is layer)
    if layer._parameters["weight"] is before:
        raise ValueError(f"torchao did not quantise this layer: {layer}")
