"""Handle tied weights and shared modules: one tensor, or one module, under several names.

The rule: an adapter acts on the module that carries it, under every name of that module, and not on other modules with
the same weight. A trained base parameter is one tensor and changes under all of its names. The report says both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_peft.core.state.plan import Plan
from lightning_peft.core.names import is_within, join, leaf, owner_of
from lightning_peft.core.targeting.base_modules import base_modules, base_parameters

__all__ = ["seen_once", "shared_modules", "tie_notes", "tied_names", "under_all_names", "with_tied"]


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Map each name of a parameter held by several modules to all of its names, one per module."""
    names: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    modules = {name: id(module) for name, module in base_modules(model, remove_duplicate=False)}
    found: dict[str, list[str]] = {}
    for group in names.values():
        owners = {modules.get(owner_of(name), name): name for name in reversed(group)}  # absent: compiled by jit
        if len(owners) > 1:
            found |= {name: list(owners.values()) for name in owners.values()}
    return found


def shared_modules(model: nn.Module) -> dict[str, list[str]]:
    """Map the first name of each base module that has several names to its other names."""
    first = {id(module): name for name, module in base_modules(model)}
    found: dict[str, list[str]] = {}
    for name, module in base_modules(model, remove_duplicate=False):
        if name != first[id(module)]:
            found.setdefault(first[id(module)], []).append(name)
    return found


def seen_once(model: nn.Module) -> dict[str, list[str]]:
    """Return the part of :func:`shared_modules` where replacing the module under one name leaves other names unchanged.

    A module that is shared only because its parent is shared is left out: replacing it under one name replaces it
    under all of them.
    """

    def place(name: str) -> tuple[int, str]:
        return id(model.get_submodule(owner_of(name))), leaf(name)

    shared = shared_modules(model)
    left = {name: [o for o in others if place(o) != place(name)] for name, others in shared.items()}
    return {name: others for name, others in left.items() if others}


def with_tied(
    model: nn.Module, modules: Iterable[str], parameters: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Extend the ``modules`` and ``parameters`` that train by what is tied to them and therefore trains too.

    A module whose parameters are all tied to parameters inside ``modules`` is added as a module.
    """
    modules, parameters = list(modules), list(parameters)
    tied = tied_names(model)

    def inside(name: str) -> bool:
        return is_within(name, *wanted)

    wanted = tuple(modules)
    for name in [n for n in tied if not inside(n) and any(map(inside, tied[n]))]:
        owner = owner_of(name)
        own = [join(owner, key) for key, _ in model.get_submodule(owner).named_parameters()]
        if owner and all(any(map(inside, tied.get(key, ()))) for key in own):
            modules.append(owner)
        else:
            parameters.append(name)
    parameters += [o for name in [*parameters] for o in tied.get(name, ()) if not inside(o)]
    return tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(parameters))


def under_all_names(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``values``, keyed by parameter name, with an additional entry for every tied name."""
    tied = tied_names(model)
    return {other: value for name, value in values.items() for other in tied.get(name, ())} | dict(values)


def tie_notes(model: nn.Module, plan: Plan) -> list[str]:
    """Return the report's notes on ties and shared modules that ``plan`` affects."""
    tied, notes = tied_names(model), []
    modules, parameters = with_tied(model, plan.train_modules, plan.train)
    for name in [n for n in (*modules, *parameters) if n not in (*plan.train_modules, *plan.train)]:
        notes.append(f"{name} trains as well: it holds the same tensor as a trained parameter and stays tied to it")
    hosts = dict.fromkeys(a.host for a in plan.attach)
    for host, adapter in ((a.host, a.adapter) for a in plan.attach):
        for weight in (join(host, p) for p in adapter.weights()):
            apart = [o for o in tied.get(weight, ()) if o != weight and owner_of(o) not in hosts]
            if apart:
                notes.append(f"{host} is adapted alone: {', '.join(apart)} holds the same tensor and is unchanged")
    shared = seen_once(model)
    for name in dict.fromkeys(n for n in (*hosts, *plan.train_modules) if n in shared):
        notes.append(f"{name} is the same module as {', '.join(shared[name])}: its changes apply under each name")
    return notes
