"""Find computations with stored parameters that bypass the adapters on them.

Code that reads a parameter as an attribute of its module gets the adapted value (see ``reads``). Code that gets the
parameter in another way (``named_parameters()``, ``_parameters``, a list made in ``__init__``) computes with the stored
value: the adapter has no effect there, and merging changes the output. Nothing can replace the value in such code, but
a ``TorchFunctionMode`` sees each operation that uses it.

Not everything that uses a stored parameter bypasses an adapter. The forward of its module does not, because adapters
run around it. A penalty on weights, a moving average or ``x.to(weight)`` does not apply the parameter to the batch. So
an operation is reported only if it combines a stored parameter, or a value computed only from parameters, with other
tensors. Arithmetic between tensors of the same shape is not reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_peft.core.adapters.reads import forward_values
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.checkpoint_frame import in_backward
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.module_io import tensors_in
from lightning_peft.core.targeting.computed_weights import stored_tensor

__all__ = ["RawReads", "StoredParameter"]

#: use the dtype, device or shape of a tensor, or write into it
_LIKE = frozenset({"to", "type_as", "view_as", "expand_as", "reshape_as", "resize_as_", "copy_", "__set__", "set_"})
#: arithmetic that also occurs between parameters, as in moving averages and in the distance to a starting point
_ARITHMETIC = frozenset(
    f"{dunder}{name}{end}"
    for name in ("add", "sub", "mul", "div", "truediv", "rsub", "lerp", "addcmul", "where", "equal", "allclose", "eq")
    for dunder, end in (("", ""), ("", "_"), ("__", "__"), ("__i", "__"), ("__r", "__"))
) | {"mse_loss", "l1_loss", "dist", "cosine_similarity", "isclose", "ne", "__ne__"}
_SAME_SIZE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"})


class StoredParameter(NamedTuple):
    """A parameter of a module with adapters, and the name under which the module reads it."""

    host_name: str
    host: nn.Module
    name: str


class RawReads(TorchFunctionMode):
    """While it is entered, records operations that use stored parameters of ``hosts`` outside of these modules.

    Args:
        model: the module that contains ``hosts``. Parameters that other modules of it share are left out: if a weight
            is tied, an adapter acts only in the module that carries it.
        hosts: modules with adapters, by name.
    """

    def __init__(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        #: the operations found, by parameter: the name of the function and where it was called
        self.found: dict[StoredParameter, tuple[str, str]] = {}
        self._weights = WeakTensorKeyDictionary()  # tensor -> the stored parameters it is made from
        # Known, but without an origin: combining these with a stored parameter does not apply it to the batch.
        for tensor in (*model.parameters(), *model.buffers()):
            self._weights[tensor] = ()
        owners = [p for module in model.modules() for p in module._parameters.values() if p is not None]
        for host_name, host in hosts.items():
            for name in {*host._parameters, *cast(AdapterStack, host.adapters).changed}:
                if isinstance(stored := stored_tensor(host, name), nn.Parameter):
                    self._weights[stored] = (*self._weights.get(stored, ()), StoredParameter(host_name, host, name))
        for tensor, origins in [*self._weights.items()]:  # leave out what other modules share
            if origins and sum(p is tensor for p in owners) != len(origins):
                self._weights[tensor] = ()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # Backward uses tensors that the forward saved, and the forward was checked.
        if torch.compiler.is_compiling() or in_backward():
            return result
        tensors = list(tensors_in((args, kwargs or {})))
        stored = {origin for t in tensors for origin in self._weights.get(t, ())}
        if stored:
            self._look(getattr(func, "__name__", repr(func)), stored, tensors, result)
        return result

    def _look(self, function: str, stored: set[StoredParameter], tensors: list[Tensor], result: Any) -> None:
        hosts = {origin.host for origin in stored}
        # While a host's own forward runs, it may use its stored parameters, because the adapters run around it.
        if function in _SAME_SIZE or function.startswith("new_") or any(forward_values(h) is not None for h in hosts):
            return
        frame = _caller(sys._getframe(2))
        if frame is None:
            return
        used = [t for t in tensors if self._weights.get(t)]
        others = [t for t in tensors if t not in self._weights and t.dim()]
        if function in _LIKE:
            others, used = [], used if tensors[0] is used[0] else []
        elif function in _ARITHMETIC and all(t.shape == used[0].shape for t in others):
            others = []
        if others:
            for origin in stored - self.found.keys():
                if origin.name.partition(".")[0] in origin.host.adapters.values_to_read(origin.host, origin.name):  # type: ignore[union-attr, operator]
                    self.found[origin] = function, _place(frame)
        elif used:  # a value made from parameters only counts as the parameter from now on
            for tensor in tensors_in(result):
                if tensor.dim() and tensor.is_floating_point():
                    self._weights[tensor] = tuple(stored)


def _caller(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the user's code that called an operation.

    None if this package computes an adapted value, or in compiled code, which runs modules and adapters as one graph.
    """
    user = None
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        compiled = isinstance(frame.f_locals.get("self"), torch.fx.GraphModule)
        if compiled or frame.f_code is AdapterStack.values_to_read.__code__:
            return None
        if user is None and package != "torch" and frame.f_code.co_name != "__torch_function__":
            user = frame
        frame = frame.f_back
    return user


def _place(frame: FrameType) -> str:
    module = frame.f_locals.get("self")
    where = f"{original_class(module).__name__}." if isinstance(module, nn.Module) else ""
    return f"{where}{frame.f_code.co_name} ({frame.f_code.co_filename}, line {frame.f_lineno})"
