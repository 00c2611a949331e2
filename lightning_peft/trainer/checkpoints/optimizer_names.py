"""Convert optimizer states between parameter names (sharded checkpoints) and parameter numbers (files).

torch's optimizers accept any keys in place of the numbers, so only the order of the parameters matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.names import canonical, listed
from lightning_peft.core.state.state_dict import StateError

__all__ = ["in_order", "optimizer_by_name"]


def optimizer_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with the canonical names of parameters in place of numbers."""
    names = iter(_names(optimizer, module))
    state = optimizer.state_dict()
    numbers = {number: next(names) for group in state["param_groups"] for number in group["params"]}
    groups = [{**group, "params": [numbers[n] for n in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[n]: value for n, value in state["state"].items()}, "param_groups": groups}


def in_order(saved: Mapping[str, Any], optimizer: Optimizer, module: nn.Module) -> Mapping[str, Any]:
    """Return the state of an optimizer that stores names, with its parameters in the order of ``optimizer``.

    A state with numbers is returned unchanged, because it is in the order in which it was saved; so is a state without
    parameter groups.

    Raises:
        StateError: if a group of ``optimizer`` has other parameters than those of the checkpoint.
    """
    found = saved.get("param_groups", ())  # optimizers that wrap another one may have states of another form
    if all(isinstance(name, int) for group in found for name in group["params"]):
        return saved
    by_name = {canonical(str(name)): value for name, value in saved["state"].items()}
    groups = [{canonical(str(name)) for name in group["params"]} for group in found]
    names, ordered = iter(_names(optimizer, module)), []
    for group in optimizer.param_groups:
        own = [next(names) for _ in group["params"]]
        if set(own) not in groups:
            raise StateError(
                f"the checkpoint has no parameter group with {listed(own)}. Build the optimizer's groups as in the run "
                "that saved it"
            )
        ordered.append({**found[groups.index(set(own))], "params": own})
    return {"state": by_name, "param_groups": ordered}


def _names(optimizer: Optimizer, module: nn.Module) -> Iterable[str]:
    names = {id(p): canonical(name) for name, p in module.named_parameters()}
    return (names[id(p)] for group in optimizer.param_groups for p in group["params"])
