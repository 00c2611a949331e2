"""Check that methods can be applied to a model, before anything is changed.

``apply`` calls ``check_injectable`` before it plans, ``check_order`` and ``check_trial`` on its plans, ``check_hosts``
before it changes the model, and ``check_saving`` while a failure can still be undone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.effective_weights import lost_input
from lightning_peft.core.adapters.lookup import hosts, stacks
from lightning_peft.core.adapters.stack import Adapted, AdapterStack
from lightning_peft.core.class_swap import check_mixin, has_mixin, original_class
from lightning_peft.core.injection.attach import check_host
from lightning_peft.core.injection.check_forward import forward_problem
from lightning_peft.core.injection.saving_trial import saving_problem
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.freezing import FullPrecision
from lightning_peft.core.state.plan import Method, Plan, unfrozen
from lightning_peft.core.targeting.base_modules import base_buffers, base_modules, base_parameters
from lightning_peft.core.targeting.storage import storage_problem

__all__ = [
    "InjectionError",
    "check_hosts",
    "check_initialized",
    "check_injectable",
    "check_order",
    "check_saving",
    "check_trial",
    "lazy_parameters",
]


class InjectionError(ValueError):
    """Methods cannot be applied to this model. Nothing was changed."""


def check_injectable(model: nn.Module) -> None:
    """Check that ``model`` can take adapters.

    Raises:
        InjectionError: if it is compiled, sharded or wrapped for distributed training, contains layers of PEFT or
            parameters without a shape, or is part of an adapted model.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InjectionError(
            "the model is compiled by torch.jit, and compiled code would not run the adapters: apply methods to the "
            "Python module that was compiled"
        )
    check_initialized(model)
    if injection_state(model) is None and (adapted := next(hosts(model), None)) is not None:
        raise InjectionError(
            f"{adapted[0] or 'the model'} carries adapters of a larger model that this is a part of: apply further "
            "methods to that model"
        )
    for name, module in base_modules(model):
        where = name or "the model"
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None:
            raise InjectionError(
                f"{where} is already compiled, and compiled code would not run the adapters: apply methods "
                "first, then call torch.compile"
            )
        if original_class(module).__module__.partition(".")[0] == "peft":
            raise InjectionError(
                f"{where} is a module of PEFT ({original_class(module).__name__}): methods would adapt PEFT's own "
                "layers and freeze what PEFT trains. Pass the plain model (merge_and_unload() or unload() of the "
                "PeftModel), and load adapters that PEFT saved with lp.load_adapter"
            )
        mro = {c.__name__ for c in original_class(module).__mro__} | {c.__name__ for c in type(module).__mro__}
        if mro & {"FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel"}:
            raise InjectionError(
                f"{where} is already sharded or wrapped for distributed training: every rank would get its own "
                f"adapters; apply the methods first (in configure_model: lp.apply(self) before fully_shard)"
            )


def lazy_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of lazy modules that do not have a shape yet."""
    return [name for name, p in [*base_parameters(model), *base_buffers(model)] if is_lazy(p)]


def check_initialized(model: nn.Module) -> None:
    if lazy := lazy_parameters(model):
        raise InjectionError(
            f"{', '.join(lazy)} have no shape yet: a lazy module creates them in its first call, but a method must "
            "know the parameters that it freezes, adapts and saves. Run one batch through the model first, in __init__ "
            "or configure_model; set example_input_array, which a Trainer then runs; or use layers with explicit sizes "
            "(nn.Linear instead of nn.LazyLinear)"
        )


def check_hosts(model: nn.Module, plans: Mapping[str, tuple[Method, Plan]]) -> None:
    for name, (method, plan) in plans.items():
        try:
            for a in plan.attach:
                check_host(model, a.host, name, overrides=bool(a.adapter.overrides()))
            for name_of, parameters, _ in unfrozen(model, plan):
                for parameter in parameters:
                    if (problem := storage_problem(parameter)) is not None:
                        what = repr(name_of) if name_of else "a parameter of the model itself"
                        raise ValueError(f"{what} cannot train, because it {problem}. Exclude it from trainable")
            for trained in filter(None, plan.train_modules):
                check_mixin(model.get_submodule(trained), FullPrecision, trained)
        except ValueError as error:
            raise InjectionError(f"{type(method).__name__} {name!r}: {error}") from error


def check_order(model: nn.Module, plans: Iterable[Plan]) -> None:
    """Refuse methods if one would lose its dropout because of a later one on the same module."""
    new: dict[str, list[Adapter]] = {}
    for plan in plans:
        for a in plan.attach:
            new.setdefault(a.host, []).extend(a.adapter.components())
    for name, adapters in new.items():
        if not any(adapter.modifies_weight for adapter in adapters):
            continue
        host = model.get_submodule(name)
        before = cast(AdapterStack, host.adapters).running() if has_mixin(host, Adapted) else ()
        if (problem := lost_input([*before, *adapters])) is not None:
            raise InjectionError(problem)


def check_trial(model: nn.Module, plans: Mapping[str, tuple[Method, Plan]]) -> None:
    """Refuse adapters that would fail in the first forward, if a trial forward is possible."""
    for name, (method, plan) in plans.items():
        if (problem := forward_problem(model, plan)) is not None:
            raise InjectionError(f"{type(method).__name__} {name!r}, in a trial forward: {problem}")


def check_saving(model: nn.Module, name: str, audit: str) -> None:
    """Refuse an adapter that could not be saved after training. A merged model cannot be saved and is not checked."""
    if audit == "off" or any(stack.merged is not None for stack in stacks(model).values()):
        return
    problem, _ = saving_problem(model, name)
    if problem is None:
        return
    message = f"{problem}. Fix this before training, or pass audit='warn' or 'off' to train anyway"
    if audit == "error":
        raise InjectionError(message)
    warnings.warn(message, stacklevel=4)
