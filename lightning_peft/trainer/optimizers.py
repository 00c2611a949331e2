"""Run the user's ``configure_optimizers`` so that the optimizers hold exactly the parameters that train.

Code written for the base may sort parameters by names or classes that it knows, and raise an error for those of an
adapter. It is then run again on the module without adapters, and each adapter joins the parameter group of the weight
that it adapts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.names import canonical, is_adapter_key, listed, parents
from lightning_peft.core.record import deferred_parameters, injected_module, injection_state
from lightning_peft.core.targeting.computed_weights import stored_tensor

__all__ = ["add_adapters", "configured", "drop_frozen", "has_gradients"]


def configured(module: nn.Module, configure: Callable[[], Any]) -> Any:
    """Return what ``configure`` returns for ``module``; if it raises because of the adapters, run it without them."""
    try:
        # Parameters that a method unfreezes later must be in a group from the start, and the user's code assigns groups
        # now.
        with _requires_grad(p for p in deferred_parameters(module)):
            return configure()
    except Exception as error:  # the user's code may raise anything for a parameter that it does not know
        record = injection_state(module)
        if record is None:
            raise
        # For this run, make the parameters trainable that were trainable before the methods froze them.
        inner = injected_module(module)
        trained = [p for n, p in inner.named_parameters() if canonical(n) in record.trained_before]
        try:
            with _requires_grad(trained), _without_adapters(module):
                found = configure()
        except Exception:  # it fails without adapters too, so they are not the cause
            raise error from None
        rank_zero_info(
            f"configure_optimizers raised {type(error).__name__} with adapters in the module, so it was run without "
            "them: each adapter joins the parameter group of the weight it adapts"
        )
        return found


@contextmanager
def _requires_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _without_adapters(module: nn.Module) -> Iterator[None]:
    # Only hidden from named_parameters(), not detached: the adapters keep their values and their order.
    before = [(host._modules, dict(host._modules)) for _, host in hosts(module)]
    for children, _ in before:
        del children["adapters"]
    try:
        yield
    finally:
        # Restore the original order too, because the order of the module's parameters follows from it.
        for children, all_of_them in before:
            children.clear()
            children.update(all_of_them)


def add_adapters(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Add trainable adapter parameters that no optimizer holds to the parameter group of the weight they adapt.

    An adapter that does not adapt a weight joins the group of its host's parameters, if the optimizers hold all of
    them. If they do not hold the adapted parameters, the user's code excludes this part of the model, and the adapter
    is not added.
    """
    groups = {id(p): group for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): canonical(name) for name, p in module.named_parameters()}
    for host_name, host in hosts(module):
        for adapter in cast(AdapterStack, host.adapters).values():
            missing = [p for p in adapter.parameters() if p.requires_grad and id(p) not in groups]
            adapted = _adapted(module, host_name, host, cast(Adapter, adapter)) if missing else []
            if adapted and all(id(p) in groups for p in adapted):
                group = groups[id(adapted[0])]
                group["params"] += missing
                if "param_names" in group:  # the optimizer was built from named_parameters(), and saves the names
                    group["param_names"] += [names[id(p)] for p in missing]
                groups |= {id(p): group for p in missing}


def _adapted(module: nn.Module, host_name: str, host: nn.Module, adapter: Adapter) -> list[Any]:
    """The base parameters that an adapter belongs to: its weights, or else those of the nearest enclosing module."""
    names = [name for part in adapter.components() for name in (*part.weights(), *part.overrides())]
    weights = [p for name in names if isinstance(p := stored_tensor(host, name), nn.Parameter)]
    # An adapter on activations may sit on a module without parameters (a residual sum): look further out.
    for around in reversed([*parents(host_name), host_name]):
        if weights:
            break
        inside = module.get_submodule(around).named_parameters()
        weights = [p for name, p in inside if not is_adapter_key(name)]
    return weights


def drop_frozen(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Remove frozen parameters from all groups.

    Weight decay would change frozen parameters that stayed, and the optimizer's state would cover the whole base.
    Groups are kept even if they become empty, because learning-rate schedulers hold one value per group.

    Raises:
        MisconfigurationException: if no optimizer has a parameter left.
    """
    names = {id(p): canonical(name) for name, p in module.named_parameters()}
    deferred = {id(p) for p in deferred_parameters(module)}
    empty: list[str] = []  # one clause for each optimizer
    for index, optimizer in enumerate(optimizers):
        kind, dropped, emptied = type(optimizer).__name__, [], []
        for group in optimizer.param_groups:
            gone = _drop_from_group(group, deferred)
            dropped += gone
            emptied += gone if not group["params"] else []
        # Frozen adapters are never meant to train here, and there may be many.
        base = [name for p in dropped if not is_adapter_key(name := names.get(id(p), "unnamed"))]
        if base:
            which = listed(base)
            rank_zero_info(f"{kind}: {len(base)} frozen parameters were left out: {which}")
        which = listed(names.get(id(p), "unnamed") for p in emptied)
        if not any(group["params"] for group in optimizer.param_groups):
            empty.append(
                f"optimizer {index} ({kind}) has nothing to train, since all its parameters are frozen: {which}"
            )
        elif emptied:
            rank_zero_warn(
                f"{kind} has an empty parameter group, because all its parameters are frozen: {which}. To train them, "
                "name them in trainable"
            )
    if len(empty) == len(optimizers):
        raise MisconfigurationException(
            "configure_optimizers returned optimizers over frozen parameters only, so nothing would train: "
            f"{'; '.join(empty)}. Build one over lp.trainable_parameters(self), or over self.parameters()"
        )
    for one in empty:
        rank_zero_warn(f"{one}. Its steps have no effect. To train these parameters, name them in trainable")


def _drop_from_group(group: dict[str, Any], deferred: set[int]) -> list[nn.Parameter]:
    """Remove and return the parameters of one group that never train. Deferred ones are kept: they unfreeze later."""
    before = group["params"]
    # By index, so that param_names stays aligned with params.
    kept = [i for i, p in enumerate(before) if p.requires_grad or id(p) in deferred]
    for key in {"params", "param_names"} & group.keys():
        group[key] = [group[key][i] for i in kept]
    return [p for i, p in enumerate(before) if i not in set(kept)]


def has_gradients(optimizer: Optimizer) -> bool:
    """Whether any parameter of ``optimizer`` has a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
