"""Find the frozen values of a model that change without gradients: EMA teachers, centres, statistics, extra state.

Buffers and extra state are compared with copies. Parameters, and buffers that hold packed weights (GPTQ, AWQ), are
compared with digests, because a copy of a frozen base would double its memory. A digest reads each value once and
misses a change only if 64-bit sums happen to collide.
"""

from __future__ import annotations

import pickle
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.names import canonical
from lightning_peft.core.sharded_tensors import is_sharded, local_part
from lightning_peft.core.targeting.base_modules import base_buffers, base_parameters, base_state_dict
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.core.targeting.packed import plain_tensors

__all__ = ["InitialValues", "extra_state"]


@dataclass
class InitialValues:
    """The values of a base when methods were applied to it, by canonical name.

    Attributes:
        buffers: copies of the persistent buffers, without packed weights.
        packed: digests of the buffers that hold packed weights.
        parameters: digests of the frozen parameters; None until a fit starts.
        trained: CPU copies of what trains, unless that is most of the base.
        extra: copies of the entries of ``state_dict`` that are neither parameters nor buffers.
    """

    buffers: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, _Digest] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, _Digest] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> InitialValues:
        """Record the current values of ``model``, except parameters: :meth:`mark` records those later."""
        stored = model.state_dict().keys()
        buffers = {canonical(name): b.detach() for name, b in base_buffers(model) if name in stored}
        return cls(
            buffers={name: b.clone() for name, b in buffers.items() if not _is_packed(b)},
            extra={key: _copy(value) for key, value in extra_state(model).items()},
            packed={name: _Digest.of(b) for name, b in buffers.items() if _is_packed(b)},
        )

    def keep(self, base: Mapping[str, Tensor], trained: Container[str], adapters: Mapping[str, Tensor]) -> None:
        """Copy the tensors of ``adapters``, and those of ``base`` in ``trained`` unless that is more than half of it.

        Earlier copies are not replaced.
        """
        # Sparse tensors do not have nbytes.
        sizes = {k: v.numel() * v.element_size() for k, v in base.items() if isinstance(v, nn.Parameter)}
        most = 2 * sum(size for k, size in sizes.items() if k in trained) > sum(sizes.values())
        new = {k: v for k, v in base.items() if k in trained and not (most and k in sizes)} | dict(adapters)
        for key, value in new.items():
            if not (key in self.trained or value.is_meta or is_sharded(value)):
                self.trained[key] = value.detach().to("cpu", copy=True)

    def mark(self, model: nn.Module) -> None:
        """Compute digests of the base parameters that are not copied.

        An earlier digest is kept, unless the parameter was cast or sharded since. Its values cannot be compared with
        that digest any more, so changes are counted from now on.
        """
        old = self.parameters or {}
        self.parameters = {
            name: old[name] if name in old and old[name].comparable(parameter) else _Digest.of(parameter)
            for name, parameter in _base_parameters(model)
            if name not in self.trained
        }

    def moved(self, model: nn.Module, trained: Container[str]) -> set[str]:
        """Return the names of values that have changed, except ``trained`` and values with merged adapters."""
        merged = _merged(model)
        found = {
            name
            for name, buffer in ((canonical(name), buffer) for name, buffer in base_buffers(model))
            if name in self.buffers
            and id(buffer) not in merged
            and not self.buffers[name].is_meta  # the buffer got its values only later
            and not _equal(self.buffers[name].to(buffer), buffer)
        }
        found |= {
            key for key, value in extra_state(model).items() if key not in self.extra or _differ(self.extra[key], value)
        }
        return found.union(self.moved_marks(model, trained))

    def moved_marks(self, model: nn.Module, without: Container[str]) -> list[str]:
        """Return the names of the parameters and packed buffers whose digest has changed."""
        marks, merged = {**(self.parameters or {}), **self.packed}, _merged(model)
        buffers = ((canonical(name), buffer) for name, buffer in base_buffers(model))
        return [
            name
            for name, parameter in (*_base_parameters(model), *buffers)
            if name in marks and name not in without and id(parameter) not in merged
            if marks[name].comparable(parameter) and marks[name] != _Digest.of(parameter)
        ]

    def around(self, model: nn.Module, inner: str) -> InitialValues:
        """Return the initial values of ``model``, which holds this object's module as ``inner``.

        Values outside ``inner`` are recorded as they are now.
        """

        def outer(values: Mapping[str, Any]) -> dict[str, Any]:
            return {f"{inner}.{name}": value for name, value in values.items()}

        found = InitialValues.of(model)
        found.buffers |= outer(self.buffers)
        found.extra |= outer(self.extra)
        found.packed |= outer(self.packed)
        found.trained = outer(self.trained)
        if self.parameters is not None:
            found.parameters = outer(self.parameters)
        return found


def extra_state(model: nn.Module) -> dict[str, Any]:
    """Return the entries of ``state_dict`` that are not parameters, buffers or part of an adapter, by canonical key.

    They come from ``get_extra_state``, from persistent states of torchmetrics, and from quantised layers.
    """
    tensors = {name for name, _ in base_parameters(model, remove_duplicate=False)}
    tensors |= {name for name, _ in base_buffers(model, remove_duplicate=False)}
    return {canonical(k): v for k, v in base_state_dict(model).items() if k not in tensors}


@dataclass(frozen=True)
class _Digest:
    """A digest of a parameter or buffer; for a sharded one, of the values on this rank."""

    dtype: torch.dtype
    shape: torch.Size
    sums: tuple[int, ...] | None

    @classmethod
    def of(cls, parameter: Tensor) -> _Digest:
        local = local_part(parameter).detach()
        return cls(local.dtype, local.shape, _sums(local))

    def comparable(self, parameter: Tensor) -> bool:
        local = local_part(parameter)
        return self.sums is not None and (self.dtype, self.shape) == (local.dtype, local.shape)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Like ``torch.equal``, which does not compare sparse tensors such as the adjacency matrix of a graph model."""
    if one.layout is other.layout is torch.strided:
        return torch.equal(one, other)
    if one.layout is not other.layout or one.shape != other.shape:
        return False
    a, b = one.to_sparse().coalesce(), other.to_sparse().coalesce()
    return torch.equal(a.indices(), b.indices()) and torch.equal(a.values(), b.values())


_COLUMNS = 1024


@torch.no_grad()
def _sums(tensor: Tensor) -> tuple[int, ...] | None:
    """Sum the bits by row and by column, weighted by position; None if the values cannot be read."""
    if tensor.is_meta:
        return None
    if len(parts := [*plain_tensors("", tensor)]) > 1:
        found = [_sums(part) for _, part in parts]
        return None if None in found else tuple(each for of_part in found for each in of_part or ())
    try:
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    except (RuntimeError, NotImplementedError, TypeError):  # a tensor subclass that cannot be viewed as bytes
        return None
    if flat.storage_offset() % 8:  # a view as 8-byte words must be aligned
        flat = flat.clone()
    even = flat.numel() - flat.numel() % 8
    words = flat[:even].view(torch.int64)
    whole = words.numel() - words.numel() % _COLUMNS
    table = words[:whole].view(-1, _COLUMNS)
    sums = [table.sum(0), table.sum(1), words[whole:], flat[even:].to(torch.int64)]
    return tuple(int(_mixed(each)) for each in sums if each.numel())


def _mixed(values: Tensor) -> Tensor:
    """Hash many numbers to one, so that every bit and position counts (in a plain sum, two top bits would cancel)."""
    places = torch.arange(1, values.numel() + 1, device=values.device) * 0x1E3779B97F4A7C15
    mixed = (values + places) * 0x3F58476D1CE4E5B9
    return ((mixed ^ (mixed >> 32)) * 0x14D049BB133111EB).sum()


def _is_packed(buffer: Tensor) -> bool:
    """Whether a buffer holds packed weights: integers, and too many of them for counters or positions."""
    return not (buffer.is_floating_point() or buffer.is_complex() or buffer.is_meta) and buffer.numel() > 65536


def _merged(model: nn.Module) -> set[int]:
    """Return the ids of the parameters and buffers that adapters are merged into."""
    merged = ((host, cast(AdapterStack, host.adapters).merged or ()) for _, host in hosts(model))
    return {id(stored_tensor(host, name)) for host, names in merged for name in names}


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in base_parameters(model, remove_duplicate=False):
        yield canonical(name), parameter


def _copy(value: Any) -> Any:
    # Pickled, because extra state can be any object: its bytes can be compared, and do not change with the object.
    return value.detach().clone() if isinstance(value, Tensor) else pickle.dumps(value)


def _differ(start: object, value: object) -> bool:
    if not isinstance(value, Tensor):
        return bool(start != pickle.dumps(value))
    return not (
        isinstance(start, Tensor) and start.shape == value.shape and torch.equal(start.to(value), value.detach())
    )
