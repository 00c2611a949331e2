"""Decide which value code gets when it reads a parameter of a module with adapters.

There are three cases:

* The module's own forward reads the stored parameter, because its adapters run around it. If an adapter modifies the
  weight, the forward reads the adapted value instead.
* Other code that computes with the parameter, such as a parent's ``F.linear(x, self.qkv.weight)``, reads the adapted
  value. Without this, adapters on layers that are never called would silently do nothing.
* Any other code (an optimizer, an initialisation, a test) gets the stored parameter.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils._pytree import tree_leaves

from lightning_peft.core.checkpoint_frame import in_backward
from lightning_peft.core.class_swap import SwapError, changed_class, original_class
from lightning_peft.core.targeting.computed_weights import computed_value

__all__ = [
    "AttributeOfCall",
    "ComputedReads",
    "computed_reads",
    "computing",
    "forward_values",
    "run_with_values",
    "unreadable_tensor",
]

# The values that each running module reads, by id of the module. Each call sets a new mapping, so that one model can
# serve several threads.
_IN_FORWARD: ContextVar[Mapping[int, Mapping[str, Any]]] = ContextVar("in_forward", default=MappingProxyType({}))
_FORWARDS = frozenset(
    {"forward", "_call_impl", "training_step", "validation_step", "test_step", "predict_step"}  # torch's, Lightning's
)
# These functions are documented to return what is stored under a name.
_LOOKUPS = frozenset(f.__code__ for f in (nn.Module.get_parameter, nn.Module.get_buffer, nn.Module.get_submodule))
# These functions only ask whether a name is taken.
_LOOKUPS |= {f.__code__ for f in (nn.Module.register_parameter, nn.Module.register_buffer, nn.Module.add_module)}


def run_with_values(
    host: nn.Module, values: Mapping[str, Any], forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Return the output of ``forward`` while ``host`` reads ``values`` by name, and stored values for other names."""
    state = host.__dict__
    before = state.get("_forward_values")
    if torch.compiler.is_compiling():
        host._forward_values = values  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            host._forward_values = before  # type: ignore[assignment]
    state["_forward_values"] = values  # compiled functions called from here cannot read a ContextVar
    token = _IN_FORWARD.set({**_IN_FORWARD.get(), id(host): values})
    try:
        return forward(*args, **kwargs)
    finally:
        _IN_FORWARD.reset(token)
        state["_forward_values"] = before


def forward_values(host: nn.Module) -> Mapping[str, Any] | None:
    """Return the values that ``host`` reads while its own forward runs; None outside of :func:`run_with_values`."""
    if torch.compiler.is_compiling():
        return host.__dict__.get("_forward_values")
    return _IN_FORWARD.get().get(id(host))


class AttributeOfCall:
    """An instance attribute that :func:`run_with_values` can replace for the thread of one call."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, host: Any, owner: type | None = None) -> Any:
        if host is None:
            return self
        place = self._place(host)
        if self.name not in place:
            raise AttributeError(f"{owner.__name__ if owner else None!r} object has no attribute {self.name!r}")
        return place[self.name]

    def __set__(self, host: Any, value: Any) -> None:
        self._place(host)[self.name] = value

    def __delete__(self, host: Any) -> None:
        del self._place(host)[self.name]

    def _place(self, host: Any) -> Any:
        values = forward_values(host)
        return host.__dict__ if values is None or self.name not in values else values


class ComputedReads(nn.Module):
    """Base class of the mixins of :func:`computed_reads`: a read of a computed weight returns the adapted value.

    The weight is a property of the class, or an attribute of the instance, so ``__getattr__`` alone would not see it.
    """

    _computed_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self._computed_names and (value := computed_value(self, name)) is not None:
            return value
        return super().__getattr__(name)


class _Picklable(type):
    """The class of these mixins, which are made when they are needed and cannot be imported."""

    _computed_names: tuple[str, ...] = ()


@functools.cache
def computed_reads(names: tuple[str, ...]) -> type[ComputedReads]:
    """Return a mixin for a module that computes the tensors ``names`` from its parameters."""
    return cast(
        type[ComputedReads],
        _Picklable("ComputedReads", (ComputedReads,), {"_computed_names": names, **{n: _read(n) for n in names}}),
    )


def _reduce(mixin: _Picklable) -> tuple:
    return computed_reads, (mixin._computed_names,)


copyreg.pickle(_Picklable, _reduce)


def _read(name: str) -> property:
    def __getattr__(host: Any) -> Any:  # ``computing`` recognises by this name that the call is not a forward
        # Refused here, because after this read torch overwrites the original tensor.
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is remove_parametrizations.__code__:
            raise SwapError(changed_class(original_class(host), name))
        return host.__getattr__(name)

    def write(host: Any, value: Any) -> None:
        computed = getattr(original_class(host), name, None)
        if isinstance(computed, property):
            computed.fset(host, value)  # type: ignore[misc]
        else:
            vars(host)[name] = value

    def delete(host: Any) -> None:
        del vars(host)[name]

    return property(__getattr__, write, delete)


def computing() -> bool:
    """Whether the code that reads an attribute is part of a forward; call it from ``__getattr__``.

    True if a ``forward`` or a Lightning step is on the call stack, or during backward, because gradient checkpointing
    repeats forwards there. The call stack is the only evidence: reading a weight looks the same to ``__getattr__``
    whether an optimizer or a forward does it.
    """
    if torch.compiler.is_compiling():
        return True
    frame = sys._getframe(1)
    while frame.f_code.co_name == "__getattr__":
        frame = frame.f_back  # type: ignore[assignment]
    if frame.f_code in _LOOKUPS or frame.f_globals.get("__name__", "").startswith("torch.distributed."):
        return False  # FSDP2 reads and replaces stored parameters in hooks that run inside a forward
    if in_backward():
        return True
    while frame is not None:
        if frame.f_code.co_name in _FORWARDS:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class _UnreadableTensor(Tensor):
    """A tensor with a shape, a dtype and a device that raises ``error`` when something is computed with it."""

    error: Exception

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise next(t.error for t in tree_leaves((args, kwargs)) if isinstance(t, _UnreadableTensor))


def unreadable_tensor(like: Tensor, message: str) -> Tensor:
    """Return a placeholder, with the shape, dtype and device of ``like``, for a value that cannot be computed.

    Models may read the dtype of a weight without computing with it (T5's ``wo.weight.dtype``), so only computing with
    the value is an error, not reading it.
    """
    if torch.compiler.is_compiling():
        return _unreadable_tensor(like, message)  # the compiler drops the operation if nothing uses the value
    tensor = Tensor._make_wrapper_subclass(_UnreadableTensor, like.shape, dtype=like.dtype, device=like.device)
    tensor.error = ValueError(message)
    return tensor


@torch.library.custom_op("lightning_peft::refused", mutates_args=())
def _unreadable_tensor(like: Tensor, message: str) -> Tensor:
    raise ValueError(message)


@_unreadable_tensor.register_fake
def _(like: Tensor, message: str) -> Tensor:
    return torch.empty_like(like)
