"""Find the parts of a model that the user froze as a whole; methods skip them unless a pattern names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_peft.core.names import is_within, join, parents
from lightning_peft.core.record import injected_name, injection_state
from lightning_peft.core.targeting.base_modules import base_modules, base_parameters
from lightning_peft.core.targeting.packed import is_compressed, is_packed

if TYPE_CHECKING:
    from lightning_peft.core.state.plan import Plan
__all__ = ["frozen_parts", "in_frozen_part", "name_frozen_parts", "why_frozen"]


def frozen_parts(model: nn.Module) -> list[str]:
    """Return the outermost modules that the user froze completely while other modules of the model train.

    Examples are the network of a perceptual loss, or a teacher. The list is empty if the user froze nothing, or
    everything. Parameters that cannot train (integers, packed formats) do not count as frozen by the user.
    """
    trains = _trains_by_module(model)
    if all(trains.values()) or not any(trains.values()):
        return []
    live = set(_with_parents(name for name, value in trains.items() if value))
    found: list[str] = []
    for name in _with_parents(trains):
        if name not in live and not is_within(name, *found):
            found.append(name)
    return found


def in_frozen_part(model: nn.Module) -> Callable[[str], bool]:
    """Return a predicate: whether a module or parameter name lies in a part that the user froze as a whole."""
    parts = frozen_parts(model)
    return lambda name: is_within(name, *parts)


def why_frozen(model: nn.Module) -> str:
    """Return a hint for the error that nothing was found to adapt, if the user froze parts; empty otherwise."""
    parts = frozen_parts(model)
    if not parts:
        return ""
    return (
        f". Skipped because you froze them while other parts train: {', '.join(parts)}. Name them in targets to "
        "adapt them, or leave the freezing to the method"
    )


def name_frozen_parts(model: nn.Module, plan: Plan) -> None:
    """Add a note to ``plan`` for each frozen part that it does not touch."""
    touched = [*(a.host for a in plan.attach), *plan.train, *plan.train_modules, *plan.deferred]
    for part in frozen_parts(model):
        inside = any(is_within(name, part) for name in touched)
        around = is_within(part, *plan.train_modules)
        if not inside and not around:
            size = sum(p.numel() for p in model.get_submodule(part).parameters())
            plan.notes.append(f"{part} was frozen before and is left alone ({size:,} parameters)")


def _trains_by_module(model: nn.Module) -> dict[str, bool]:
    """Whether any of a module's own parameters trains, or did before methods were applied, by module name."""
    record, root = injection_state(model), injected_name(model)
    before = {join(root, name) for name in record.trained_before} if record is not None else set()
    every = dict(base_parameters(model, remove_duplicate=False))
    trained = {id(p) for name, p in every.items() if name in before}  # by identity: a tied weight has several names
    found: dict[str, bool] = {}
    for name, module in base_modules(model):
        inside = record is not None and is_within(name, root)
        for parameter in module._parameters.values():
            if parameter is None or not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter):
                continue
            trains = id(parameter) in trained if inside else parameter.requires_grad
            if not trains and (is_compressed(module) or is_packed(module)):
                continue  # quantising freezes the bias of the layer as well
            found[name] = found.get(name, False) or trains
    return found


def _with_parents(names: Iterable[str]) -> list[str]:
    """Return the names and those of all their parents, outermost first."""
    around = {outer: None for name in names if name for outer in (*parents(name)[1:], name)}
    return sorted(around, key=lambda name: name.count("."))
