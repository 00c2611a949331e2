"""Turn a packed layer into an ``nn.Linear`` with a given weight, and back. The module stays the same object."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class, replace_class
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.core.targeting.packed import is_packed, linear_sizes

__all__ = ["make_packed", "make_plain", "plain_dtype"]


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first plain floating-point parameter of the base; None if there is none."""
    plain = (p for _, m in base_modules(model) if not is_packed(m) for p in m._parameters.values() if p is not None)
    return next((p.dtype for p in plain if p.is_floating_point() and p.dtype.itemsize > 1), None)


def make_plain(
    host: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[type, dict[str, Any]]:
    """Turn the packed layer ``host`` into an ``nn.Linear``.

    Args:
        host: the layer; changed in place.
        weights: its new ``weight`` (out, in), and its new ``bias`` if that changes.
        dtype: the dtype of the new weight if neither a bias nor the packed weight has a floating-point one.

    Returns:
        The class and the attributes that the layer had, for :func:`make_packed`.

    Raises:
        TypeError: if Python does not allow the class of ``host`` to be changed; ``host`` is unchanged.
    """
    own, rows_columns = vars(host), linear_sizes(host)
    assert rows_columns is not None
    before = original_class(host), {**own, "_parameters": {**own["_parameters"]}, "_buffers": {**own["_buffers"]}}
    replace_class(host, _plain_class(before[0]))
    bias, packed = weights.get("bias", stored_tensor(host, "bias")), stored_tensor(host, "weight")
    telling = [t.dtype for t in (bias, packed) if t is not None and t.is_floating_point() and t.dtype.itemsize > 1]
    dtype = [*telling, *([dtype] if dtype is not None else []), weights["weight"].dtype][0]
    made = nn.Linear(rows_columns[1], rows_columns[0], bias=False, device="meta")
    made.weight = nn.Parameter(weights["weight"].to(dtype, copy=True), requires_grad=False)
    if bias is not None:
        made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.to(dtype), requires_grad=False)
    for name in [name for name in own if not name.startswith("_") and name not in vars(made)]:
        del own[name]  # the states of the packed layer, which may be as large as its weight
    own.update({name: value for name, value in vars(made).items() if not name.startswith("_") and name != "training"})
    own.update(_parameters=made._parameters, _buffers={})
    return before


def make_packed(host: nn.Module, original: type, attributes: dict[str, Any]) -> None:
    """Undo :func:`make_plain`."""
    own = vars(host)
    kept = {name: value for name, value in own.items() if name.startswith("_") or name == "training"}
    own.update({**attributes, **kept, "_parameters": attributes["_parameters"], "_buffers": attributes["_buffers"]})
    replace_class(host, original)


@functools.cache
def _plain_class(packed: type) -> type:
    """A class of plain linear layers that an object of the class ``packed`` can get.

    Python allows only classes of the same memory layout. If ``packed`` derives from ``ABC`` first, a subclass of
    ``nn.Linear`` does so too; a copy of such a layer is an ``nn.Linear``.
    """
    layout = packed
    while layout.__base__ is not None and layout.__base__.__dictoffset__:
        layout = layout.__base__
    if layout.__base__ in (object, None):
        return nn.Linear
    first = type(layout.__base__)("Layout", (layout.__base__,), {})
    return type(first)("Linear", (first, nn.Linear), {"__module__": nn.Linear.__module__, "__reduce_ex__": _reduce_ex})


def _reduce_ex(self: Any, protocol: Any) -> tuple:
    return (nn.Linear.__new__, (nn.Linear,), *tuple(object.__reduce_ex__(self, 2))[2:])
