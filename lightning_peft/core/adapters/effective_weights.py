"""Compute the effective parameter values of a module with adapters, and run the module with them in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.core.adapters.base import BIASES, Adapter
from lightning_peft.core.adapters.reads import run_with_values
from lightning_peft.core.sharded_tensors import distributed_like
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.core.targeting.packed import dequantized, is_packed
from lightning_peft.ops.dense_gradient import dense_gradient

__all__ = [
    "as_attributes",
    "base_tensor",
    "effective_weights",
    "lost_input",
    "run_dequantized",
    "run_in_place",
    "values_before",
]


def effective_weights(
    host: nn.Module, adapters: Sequence[Adapter], dtype: torch.dtype | None = None, only: str | None = None
) -> dict[str, Tensor]:
    """Return the host's weights and biases after applying ``adapters`` in order.

    A parameter override of one adapter replaces the results of earlier adapters for that parameter.

    Args:
        host: the module that owns the parameters.
        adapters: the adapters, applied one after the other.
        dtype: the dtype to compute in and return. By default, the dtype in which each parameter is stored.
        only: return only values that are read through this attribute of the host. By default, all values that change.

    Returns:
        Tensors by parameter name, in their stored shapes.
    """
    now: dict[str, Tensor] = {}

    def current(name: str) -> Tensor | None:
        if name in now:
            return now[name]
        stored = base_tensor(host, name)
        return stored if stored is None or dtype is None else stored.to(dtype)

    def wanted(name: str) -> bool:
        return only is None or name.partition(".")[0] == only

    for adapter in adapters:
        for name, copy in adapter.overrides().items():
            if wanted(name):
                stored = stored_tensor(host, name)
                assert stored is not None
                now[name] = copy.to(dtype or stored.dtype) if copy.is_floating_point() else copy
        for parameter, part in adapter.weights().items():
            stored = current(parameter)
            assert stored is not None
            if wanted(parameter):
                with distributed_like(stored, part):
                    matrix = part.transform(part.layout.matrix(stored)).to(stored.dtype)
                weight = part.layout.stored(matrix, stored)
                # A sparse embedding produces a sparse gradient, which the operations of ``transform`` cannot take.
                sparse = getattr(host, "sparse", False) is True
                now[parameter] = dense_gradient(weight) if sparse else weight
            # A method that scales or shifts the output changes the bias too. It starts from the bias that earlier
            # adapters computed, and may add a bias to a layer that has none.
            if parameter in BIASES and part.changes_bias and wanted(BIASES[parameter]):
                with distributed_like(stored, part):
                    bias = part.transform_bias(current(BIASES[parameter]))
                if bias is not None:
                    now[BIASES[parameter]] = bias.to(stored.dtype)
    return now


def lost_input(adapters: Sequence[Adapter]) -> str | None:
    """Return why ``adapters``, in this order on one module, cannot train together; None if they can.

    If an adapter modifies the weight, the adapters before it must be applied to the weight too. Dropout acts on the
    layer's input, so it cannot be applied there.
    """
    later = None  # the adapter after ``adapter`` that modifies the weight
    for adapter in reversed(adapters):
        if later is not None and adapter.needs_input is not None:
            name = next(iter(adapter.weights().values())).site_name
            return (
                f"{adapter.needs_input} of the {type(adapter).__name__} on {name!r} would be lost: the "
                f"{type(later).__name__} after it modifies the weight itself, but dropout acts on the module's "
                "input. Apply the method with dropout last, or set its dropout=0"
            )
        later = adapter if adapter.modifies_weight else later
    return None


def values_before(host: nn.Module, adapter: Adapter, *names: str) -> list[Tensor | None]:
    """Return the host's parameters after the adapters that run before ``adapter``; None if no adapter runs before it.

    An :meth:`WeightAdapter.output` that depends on the weight reads it here, so that it equals ``transform``.
    """
    before = host.adapters.running(before=adapter)  # type: ignore[union-attr, operator]
    now = effective_weights(host, before) if before else {}
    return [now[name] if name in now else base_tensor(host, name) for name in names]


def base_tensor(host: nn.Module, name: str) -> Tensor | None:
    """Like :func:`stored_tensor`; for the weight of a packed layer, return the dequantised matrix."""
    return dequantized(host) if name == "weight" and is_packed(host) else stored_tensor(host, name)


def run_dequantized(host: nn.Module, adapters: Sequence[Adapter], x: Tensor) -> Tensor:
    """Return the output of the packed layer ``host`` with adapters that change its matrix or its bias.

    The dequantised matrix is never stored: backward computes it again.
    """

    def product(x: Tensor) -> Tensor:
        weights = effective_weights(host, adapters)
        weight = weights["weight"] if "weight" in weights else dequantized(host)  # a loaded bias changes no weight
        bias = weights.get("bias", stored_tensor(host, "bias"))
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    if not torch.is_grad_enabled():
        return product(x)
    return checkpoint(product, x, use_reentrant=False)  # type: ignore[no-any-return]


def run_in_place(
    host: Any, weights: Mapping[str, Tensor], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Return the output of ``forward`` while ``host`` reads ``weights`` instead of its stored parameters."""
    values = as_attributes(host, weights)
    if isinstance(host, nn.RNNBase):
        # An RNN reads a list of its weights, and rebuilds it if a weight is not the object that the list refers to.
        named = [*zip(host._flat_weights_names, host._flat_weights, host._flat_weight_refs)]
        values["_flat_weights"] = [values.get(name, weight) for name, weight, _ in named]
        values["_flat_weight_refs"] = [weakref.ref(values[n]) if n in values else ref for n, _, ref in named]
    return run_with_values(host, values, forward, args, kwargs)


def as_attributes(host: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Group ``weights`` by the attribute of ``host`` they are read through: for a child's weights, the child's name."""
    values: dict[str, Any] = {}
    for name, weight in weights.items():
        child, _, _ = name.rpartition(".")
        if child:
            values[child] = _Projection(
                *(weights.get(n, stored_tensor(host, n)) for n in (f"{child}.weight", f"{child}.bias"))
            )
        else:
            values[name] = weight
    return values


class _Projection:
    """Replaces ``out_proj`` of an ``nn.MultiheadAttention``, which only reads its weight and bias."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
