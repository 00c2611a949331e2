"""``lp.status``: which adapters a model has, and which of them run, train or are merged."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft.core.adapters.lookup import adapter_names, stacks
from lightning_peft.core.names import is_within
from lightning_peft.core.record import injected_module, injection_state

__all__ = ["AdapterStatus", "Status", "status"]


@dataclass(frozen=True)
class AdapterStatus:
    """The state of one method on a model.

    Attributes:
        name: the adapter's name.
        method: the class of the method.
        active: whether the forward runs it. A method without adapters, such as BitFit, is always active.
        merged: whether it is merged into the base weights.
        trainable: the number of parameters that it trains now, adapters and base.
        modules: the number of modules that carry its adapters.
    """

    name: str
    method: str
    active: bool
    merged: bool
    trainable: int
    modules: int


@dataclass(frozen=True)
class Status:
    """The methods on a model, in order of application. Printing shows a table.

    Attributes:
        adapters: one entry per method; empty for a plain model.
        trainable: the number of parameters of the model that require gradients.
        total: the number of all parameters.
    """

    adapters: tuple[AdapterStatus, ...]
    trainable: int
    total: int

    def __rich__(self) -> Table:
        title = f"{self.trainable:,} of {self.total:,} parameters train"
        table = Table(
            "adapter", "method", "active", "merged", "trainable", "modules", title=title, title_justify="left"
        )
        for each in self.adapters:
            marks = ("yes" if mark else "no" for mark in (each.active, each.merged))
            table.add_row(each.name, each.method, *marks, f"{each.trainable:,}", str(each.modules))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def status(model: nn.Module) -> Status:
    """Return which methods are on ``model``, and which of them are active, merged or trainable. Changes nothing.

    Example::

        print(lp.status(model))
        assert lp.status(model).adapters[0].active
    """
    root, record, found = injected_module(model), injection_state(model), stacks(model)
    parameters = dict(root.named_parameters())
    methods = record.methods if record is not None else {}
    names = dict.fromkeys([*methods, *adapter_names(model)])
    adapters = []
    for name in names:
        carrying = [stack for stack in found.values() if name in stack]
        own = {id(p): p for stack in carrying for p in stack[name].parameters()}
        trained = record.trained_base.get(name) if record is not None else None
        for key in (k for k in parameters if trained is not None and _trains(k, trained.modules, trained.parameters)):
            own[id(parameters[key])] = parameters[key]
        adapters.append(
            AdapterStatus(
                name=name,
                method=type(methods[name]).__name__ if name in methods else "",
                active=not carrying or any(name in stack.active and not stack.disabled for stack in carrying),
                merged=any(name in stack.merged_names for stack in carrying),
                trainable=sum(p.numel() for p in own.values() if p.requires_grad),
                modules=len(carrying),
            )
        )
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return Status(tuple(adapters), sum(n for n, trains in numbers if trains), sum(n for n, _ in numbers))


def _trains(key: str, modules: tuple[str, ...], parameters: tuple[str, ...]) -> bool:
    return key in parameters or is_within(key, *modules)
