"""The interface between a method and the core: a plan of what the method will do, made before any change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.targeting.base_modules import base_modules

__all__ = ["Attachment", "Method", "Plan", "init_device", "unfrozen", "without_values"]

_WITHOUT_VALUES: ContextVar[bool] = ContextVar("without_values", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Inside the context, methods build adapters on the meta device: with shapes, but without memory or values."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def init_device() -> torch.device:
    """Return the device on which adapters are initialised: the CPU, or meta inside :func:`without_values`."""
    return torch.device("meta" if _WITHOUT_VALUES.get() else "cpu")


class Attachment(NamedTuple):
    """One adapter that a plan attaches to one module.

    Attributes:
        host: the qualified name of the module that will carry the adapter.
        shown: the name in the report's table: the weight's for a weight adapter, usually ``host`` otherwise.
        adapter: the adapter, not yet attached.
        what: the description in the report's table, such as ``LoRA r=8 on Linear 64x64``.
    """

    host: str
    shown: str
    adapter: Adapter
    what: str


@dataclass
class Plan:
    """What one method will do to one model.

    Attributes:
        attach: the adapters, each with the module to attach it to.
        train: names of base parameters to train, with the description for the table.
        train_modules: names of base modules that train in full, such as heads; ``""`` is the whole model.
        deferred: names of base parameters that are frozen at first and train later, with their name and description
            for the table.
        hold_statistics: names of norm layers whose running statistics stay frozen although their parameters train.
        notes: sentences for the report about what is skipped and why.
        origin: options from the file that the adapter was loaded from, to be written again when it is saved.
    """

    attach: list[Attachment] = field(default_factory=list)
    train: dict[str, str] = field(default_factory=dict)
    train_modules: list[str] = field(default_factory=list)
    deferred: dict[str, tuple[str, str]] = field(default_factory=dict)
    hold_statistics: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """The interface that :func:`apply` needs from a method; :class:`lightning_peft.PEFTMethod` implements it."""

    name: str
    train_norm_stats: bool
    resume_may_differ: ClassVar[frozenset[str]]

    def plan(self, model: nn.Module) -> Plan: ...

    def config(self) -> dict[str, Any]: ...

    def configure_param_groups(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None: ...


def unfrozen(model: nn.Module, plan: Plan) -> list[tuple[str, list[nn.Parameter], str]]:
    """Return (name, parameters, description) for everything in the base that the plan trains."""
    full = [(n, _base_parameters(model.get_submodule(n)), "trains in full") for n in plan.train_modules]
    return full + [(name, [model.get_parameter(name)], what) for name, what in plan.train.items()]


def _base_parameters(module: nn.Module) -> list[nn.Parameter]:
    # Adapters inside the module are left out, because their methods decide which of their parameters train.
    found = {id(p): p for _, m in base_modules(module) for p in m.parameters(recurse=False)}
    return list(found.values())
