"""Freezing: running statistics that hold still, trained parameters that keep their precision, deferred unfreezing.

Which deferred parameters train by now is part of a checkpoint, so that loading one restores it in both directions:
what a later checkpoint trains is unfrozen before the optimizer's state comes, and what an earlier one had not
unfrozen yet is frozen again at the values of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import add_mixin, has_mixin, remove_mixin
from lightning_peft.core.record import InjectionState, injected_module, injection_state
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = [
    "FrozenNorm",
    "FullPrecision",
    "freeze_norm_statistics",
    "hold_statistics",
    "keep_full_precision",
    "set_unfrozen",
    "unfreeze",
    "unfrozen_names",
]


class FrozenNorm(nn.Module):
    """Mixin of a norm layer with running statistics: it stays in eval mode whatever its parents are set to."""

    _mode_asked: bool  # the mode it would be in, and is in again once unfrozen
    _hold_statistics = False  # whether it does so even while its parameters train

    def train(self, mode: bool = True) -> Any:
        self._mode_asked = mode
        return super().train(False)


class FullPrecision(nn.Module):
    """Mixin of a module that trains in full: its parameters stay in float32 where its model is cast lower.

    Its inputs are cast up and its outputs back to the model's type, so that it fits between its neighbours.
    """

    _compute_dtype: torch.dtype | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            if not (out.is_floating_point() and torch.finfo(out.dtype).eps > torch.finfo(t.dtype).eps):
                return out
            self._compute_dtype = out.dtype
            return t.to(out.device)

        return super()._apply(keep, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        dtype = self._compute_dtype
        if dtype is None:
            return forward(*args, **kwargs)
        args = tuple(_cast(a, torch.float32) for a in args)
        kwargs = {name: _cast(a, torch.float32) for name, a in kwargs.items()}
        return _cast(forward(*args, **kwargs), dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_cast(v, dtype) for v in value)
    return value


def freeze_norm_statistics(model: nn.Module) -> list[str]:
    """Put every norm layer that has running statistics and does not train in full in eval mode for good.

    Otherwise the statistics of the base move with every training batch, also where only the layer's bias trains.
    Returns the layers' names.
    """
    frozen = []
    for name, module in base_modules(model):
        has_statistics = isinstance(getattr(module, "running_mean", None), Tensor)
        if has_statistics and not _trains_in_full(module):
            mode = bool(module._mode_asked) if has_mixin(module, FrozenNorm) else module.training
            add_mixin(module, FrozenNorm)
            module.train(mode)
            frozen.append(name)
    return frozen


def _trains_in_full(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.requires_grad for p in own)


def hold_statistics(module: nn.Module) -> None:
    """Put a norm layer in eval mode for good, although its parameters train."""
    add_mixin(module, FrozenNorm)
    module._hold_statistics = True  # type: ignore[assignment]
    module.train(module.training)  # which the mixin makes eval mode


def keep_full_precision(modules: Iterable[nn.Module], shared: set[int]) -> None:
    """Hold the parameters of ``modules`` in float32.

    Args:
        modules: modules that train in full.
        shared: ids of parameters that other modules hold too; a module with one keeps its type, since casting
            it would cast them.
    """
    for module in modules:
        low = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
        if any(id(p) in shared for p in module.parameters()):
            continue
        add_mixin(module, FullPrecision)
        if low:
            module._compute_dtype = next(iter(low))  # type: ignore[assignment]
            module.to(torch.float32)


def unfrozen_names(model: nn.Module) -> list[str]:
    """The names of the parameters that started frozen and train by now."""
    record = injection_state(model)
    return [name for name, before in record.deferred.items() if before is not None] if record is not None else []


def unfreeze(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Let the parameters called ``names`` train from now on; returns those that did not already.

    Their values are copied to the CPU, for :func:`set_unfrozen` to go back to.
    """
    root, record = injected_module(model), injection_state(model)
    assert record is not None
    new = [name for name in names if record.deferred[name] is None]
    for name in new:
        parameter = root.get_parameter(name)
        record.deferred[name] = parameter.detach().to("cpu", copy=True)
        parameter.requires_grad_(True)
    _after_unfreezing(root, record)
    return new


@torch.no_grad()
def set_unfrozen(model: nn.Module, names: Iterable[str]) -> None:
    """Let exactly ``names`` of the deferred parameters train; others that did are frozen at the values they started
    from.

    Raises:
        KeyError: a name that is none of the model's deferred parameters.
    """
    record, wanted = injection_state(model), list(names)
    if record is None:
        return
    root = injected_module(model)
    for name, before in record.deferred.items():
        if before is not None and name not in wanted:
            parameter = root.get_parameter(name)
            parameter.copy_(before.to(parameter.device))
            parameter.requires_grad_(False)
            parameter.grad = None
            record.deferred[name] = None
    unfreeze(model, wanted)


def _after_unfreezing(root: nn.Module, record: InjectionState) -> None:
    """What follows from a change of what trains: norm statistics, and the count."""
    for module in root.modules():
        if has_mixin(module, FrozenNorm) and _trains_in_full(module) and not module._hold_statistics:
            remove_mixin(module, FrozenNorm)
            module.train(getattr(module, "_mode_asked", root.training))
    if not any(method.train_norm_stats for method in record.methods.values()):
        freeze_norm_statistics(root)
    record.report.count(root)
