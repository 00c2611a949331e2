"""Freeze norm statistics, keep trained parameters in full precision, and unfreeze deferred parameters.

A checkpoint records which deferred parameters train, and loading it restores this in both directions: parameters that
train in the checkpoint are unfrozen before the optimizer state is loaded, and parameters that do not train in it yet
are frozen again at their base values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import add_mixin, has_mixin, remove_mixin
from lightning_peft.core.record import InjectionState, injected_module, injection_state
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.computed_weights import moving_parts

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
    """Mixin for a module with running statistics: it stays in eval mode when its parents are set to train.

    The adapters of a norm layer follow the mode of its parents.
    """

    _mode_asked: bool  # the mode that was last requested; restored when the layer is unfrozen
    _hold_statistics = False  # True: stay in eval mode even while the layer's parameters train

    def train(self, mode: bool = True) -> Any:
        self._mode_asked = mode
        super().train(False)
        if (adapters := self._modules.get("adapters")) is not None:
            adapters.train(mode)
        return self


class FullPrecision(nn.Module):
    """Mixin for a module that trains in full: its parameters stay in float32 when the model is cast to less.

    Inputs are cast to float32, and outputs back to the model's dtype, so that neighbouring modules are unaffected.
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
    """Keep every module that has running statistics and does not train in full in eval mode.

    These are norm layers, and layers under spectral norm, whose weight is divided by a running estimate of its norm.
    Otherwise every training batch would change the statistics of the frozen base, even if only the layer's bias
    trains. Returns the names of the layers.
    """
    frozen: dict[str, None] = {}
    for name, module, own in _with_statistics(model):
        if not _all_train(own):
            mode = bool(module._mode_asked) if has_mixin(module, FrozenNorm) else module.training
            add_mixin(module, FrozenNorm)
            module.train(mode)
            frozen[name] = None
    return list(frozen)


def _with_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Tensor]]]:
    """Yield each layer with statistics: its name, the module that changes them, and the parameters they belong to."""
    for name, module in base_modules(model):
        if isinstance(getattr(module, "running_mean", None), Tensor):
            yield name, module, list(module.parameters(recurse=False))
        for part, sources in moving_parts(module):
            yield name, part, sources


def _all_train(own: list[Tensor]) -> bool:
    return bool(own) and all(p.requires_grad for p in own)


def hold_statistics(module: nn.Module) -> None:
    """Keep a norm layer in eval mode, although its parameters train."""
    add_mixin(module, FrozenNorm)
    module._hold_statistics = True  # type: ignore[assignment]
    module.train(module.training)  # the mixin turns this into eval mode


def keep_full_precision(modules: Iterable[nn.Module], shared: set[int]) -> None:
    """Keep the parameters of ``modules`` in float32.

    Args:
        modules: modules that train in full.
        shared: ids of parameters that other modules also hold. A module with such a parameter keeps its dtype, because
            casting it would cast the other module's parameter.
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
    """Return the names of the deferred parameters that train now."""
    record = injection_state(model)
    return [name for name, before in record.deferred.items() if before is not None] if record is not None else []


def unfreeze(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Make the deferred parameters ``names`` train from now on; return those that did not train before.

    Their values are copied to the CPU, so that :func:`set_unfrozen` can restore them.
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
    """Make exactly ``names`` of the deferred parameters train; others are frozen again at their initial values.

    Raises:
        KeyError: if a name is not one of the model's deferred parameters.
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
            parameter.grad = None  # an optimizer that holds the parameter would still step with an old gradient
            record.deferred[name] = None
    unfreeze(model, wanted)


def _after_unfreezing(root: nn.Module, record: InjectionState) -> None:
    """Update norm layers and the report's counts after a change of what trains."""
    for _, module, own in _with_statistics(root):
        if has_mixin(module, FrozenNorm) and _all_train(own) and not module._hold_statistics:
            remove_mixin(module, FrozenNorm)
            module.train(getattr(module, "_mode_asked", root.training))
    if not any(method.train_norm_stats for method in record.methods.values()):
        freeze_norm_statistics(root)
    record.report.count(root, record.sizes.values())
