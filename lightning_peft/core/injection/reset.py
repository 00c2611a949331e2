"""Restore the initial values of everything that methods train, for example for the next cross-validation fold."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import check_unmerged, stack_prefixes
from lightning_peft.core.names import canonical
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.sharded_tensors import sharded_like
from lightning_peft.core.state.freezing import set_unfrozen
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import local_state_dict

__all__ = ["moved_adapters", "reset"]


@torch.no_grad()
def reset(model: nn.Module) -> None:
    """Restore adapters, trained base parameters and changed buffers to their values when methods were applied.

    The methods stay applied, and the same parameters train as before; parameters that a method unfroze during training
    are frozen again. Optimizers and callbacks keep their state: create new ones for a new run.

    Args:
        model: the adapted model; changed in place.

    Raises:
        ValueError: if no methods were applied, or adapters are merged into the base.
        StateError: if a parameter has changed but its initial value was not kept, because it changed without gradients
            or the methods train more than half of the base. Nothing is changed.

    Example::

        for fold in folds:
            lp.reset(module)
            L.Trainer(callbacks=[lp.LoRA(r=8)]).fit(module, fold)
    """
    record, root = injection_state(model), injected_module(model)
    if record is None:
        raise ValueError("lp.reset: no methods were applied to this model, so there is nothing to restore")
    check_unmerged(root)
    current = {canonical(k): v for k, v in local_state_dict(root, keep_vars=True).items()}
    lost = record.start.moved_marks(root, {**record.deferred, **record.start.trained})
    lost += [k for k, v in record.start.trained.items() if k in current and current[k].shape != v.shape]
    if lost:
        raise StateError(
            f"lp.reset cannot restore {', '.join(sorted(lost)[:5])}: no initial value was kept, because it changed "
            "without gradients, is sharded, or the methods train more than half of the base. Load the base's weights "
            "first (model.load_state_dict(initial, strict=False)), or build a new model"
        )
    set_unfrozen(root, ())
    for key, value in {**record.start.buffers, **record.start.trained}.items():
        if key in current:
            _put(current[key], value)
    extra = {k: v if isinstance(v, Tensor) else pickle.loads(v) for k, v in record.start.extra.items()}
    nn.Module.load_state_dict(root, extra, strict=False)
    record.moved = set()


def _put(tensor: Any, value: Tensor) -> None:
    tensor.grad = None
    tensor.copy_(sharded_like(value, tensor))


def moved_adapters(model: nn.Module) -> list[str]:
    """Return the keys of adapter tensors that differ from their initial values."""
    record, root = injection_state(model), injected_module(model)
    if record is None:
        return []
    inside = stack_prefixes(root)
    state = {canonical(k): v for k, v in local_state_dict(root).items() if k.startswith(inside)}
    start = record.start.trained
    return sorted(k for k, v in state.items() if k in start and not torch.equal(start[k].to(v), v))
