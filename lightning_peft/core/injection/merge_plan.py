"""The merged values of one module: compute them, write them, and restore the original ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.injection.merged_values import merged_values
from lightning_peft.core.injection.plain_layer import make_packed, make_plain
from lightning_peft.core.injection.write_back import shared_source, write_back
from lightning_peft.core.names import is_adapter_key, join
from lightning_peft.core.targeting.computed_weights import is_computed, refresh, stored_tensor
from lightning_peft.core.targeting.packed import is_packed
from lightning_peft.ops.finite import is_finite

__all__ = ["MergeError", "MergePlan", "changed_tensors", "restore"]


class MergeError(ValueError):
    """Adapters cannot be merged into the base. Nothing was changed."""


class MergePlan:
    """The new values of one host's parameters, after merging the adapters ``names`` in order.

    Attributes:
        parameters: the full name of each tensor that changes, by its name in the host.
        dtype: the dtype of the plain weight that replaces a packed one, if the layer itself does not determine it.

    Raises:
        MergeError: if a weight that is shared with other modules would not be finite.
    """

    def __init__(
        self,
        host_name: str,
        host: nn.Module,
        names: tuple[str, ...],
        shared: Mapping[str, list[str]],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.host_name, self.host, self.names, self.dtype = host_name, host, names, dtype
        self.stack = cast(AdapterStack, host.adapters)
        parts = [part for name in names for part in cast(Adapter, self.stack[name]).components()]
        touched = sorted({p for part in parts for p in changed_tensors(part) or ()})
        self.parameters = {p: join(host_name, p) for p in touched}
        self.computed = [p for p in touched if is_computed(host, p)]
        for p in self.computed:
            if (problem := shared_source(host_name, host, p, shared)) is not None:
                raise MergeError(problem)
        # The new values of shared tensors are computed before any host is written: they are compared between hosts, and
        # all must start from the original value.
        self._weights = None if shared.keys().isdisjoint(self.parameters.values()) else self._compute()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the new values by name in the host."""
        return self._compute() if self._weights is None else self._weights

    def _compute(self) -> dict[str, torch.Tensor]:
        return _merged_weights(self.host_name, self.host, self.names)

    def write(self, tied: Mapping[str, list[str]]) -> None:
        """Write the new values in place and keep copies of the old ones.

        A parameter in ``tied`` is replaced by a new one, and the old object is kept, so that the other modules that
        share it are unaffected.

        Raises:
            MergeError: if a value is not finite, or the parameters that a weight is computed from cannot express its
                new value; nothing was changed.
        """
        weights = self.weights()
        # Recorded before each tensor is written, so that restore undoes a write that is interrupted.
        self.stack.merged, self.stack.merged_names = {}, self.names
        if is_packed(self.host) and "weight" in weights:
            try:
                self.stack.packed = make_plain(self.host, weights, self.dtype)
            except TypeError as error:
                self.stack.merged, self.stack.merged_names = None, ()
                raise MergeError(f"{self.host_name!r} cannot become a plain layer: {error}") from error
            self.stack.merged = dict.fromkeys(weights)
            weights = {}
        try:
            for name in self.computed:
                self.stack.merged |= write_back(self.host_name, self.host, name, weights.pop(name))
        except ValueError as error:
            restore(self.host)
            raise MergeError(str(error)) from error
        for name, weight in weights.items():
            stored = stored_tensor(self.host, name)
            # A bias that the layer does not have yet, a tied weight and a weight of another shape need a new parameter.
            if stored is None or self.parameters[name] in tied or stored.shape != weight.shape:
                self.stack.merged[name] = stored
                dtype = _dtype(self.host) if stored is None else stored.dtype
                weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
            else:
                self.stack.merged[name] = stored.detach().clone()
            _set(self.host, name, weight)
        self.stack.refresh()


def _merged_weights(host_name: str, host: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    stack = cast(AdapterStack, host.adapters)
    weights = merged_values(host, [part for name in names for part in cast(Adapter, stack[name]).components()])
    rounded: dict[str, torch.Tensor] = {}
    for parameter, weight in weights.items():
        current = stored_tensor(host, parameter)
        if (parameter == "weight" or current is None) and is_packed(host):
            rounded[parameter] = weight.detach()  # rounded when the plain layer is made
        else:
            rounded[parameter] = weight.detach().to(_dtype(host) if current is None else current.dtype)
        if not is_finite(rounded[parameter]):
            raise MergeError(f"{host_name}.{parameter} would hold NaN or infinity after the merge")
    return rounded


def _dtype(host: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in host.named_parameters() if not is_adapter_key(name))


def _set(host: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Write a parameter or buffer in place; an ``nn.Parameter`` replaces the existing one, and None removes it."""
    path, _, last = name.rpartition(".")
    owner = host.get_submodule(path)
    if value is None or isinstance(value, nn.Parameter):
        before = owner._parameters[last]
        setattr(owner, last, value)  # through setattr, with which a recurrent layer updates its own list of parameters
        for width in ("out_features", "out_channels", "num_embeddings"):
            if before is not None and value is not None and getattr(owner, width, None) == len(before):
                setattr(owner, width, len(value))
    else:
        cast(torch.Tensor, stored_tensor(owner, last)).copy_(value)


def restore(host: nn.Module) -> None:
    """Put the original tensors back after :meth:`MergePlan.write`, also after one that was interrupted."""
    stack = cast(AdapterStack, host.adapters)
    if stack.packed is not None:
        make_packed(host, *stack.packed)
    else:
        for parameter, weight in (stack.merged or {}).items():
            _set(host, parameter, weight)
        refresh(host)
    stack.merged, stack.merged_names, stack.packed = None, (), None
    stack.refresh()


def changed_tensors(adapter: Adapter) -> set[str] | None:
    """Return the names of the host's tensors that an adapter changes; None if it does not change weights."""
    return set(adapter.changes()) or None
