"""Undo a change of a model that fails halfway."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.record import InjectionState, injection_state
from lightning_peft.core.targeting.base_modules import AdapterContainer, base_modules, base_parameters

__all__ = ["all_or_nothing", "gc_held"]

#: the dictionaries that every module has: parameters, buffers, children, hooks
_DICTS = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


@contextmanager
def gc_held() -> Iterator[None]:
    """Suspend garbage collection: the many new objects stay alive, and every collection would traverse all of them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo every change of ``model`` if the context ends in an exception, ``KeyboardInterrupt`` included.

    Restores classes, attributes, hooks, children, parameters (including dtype and ``requires_grad``), buffers and the
    record of the methods. Values that were changed in place are not restored.
    """
    # Collect every reference now, so that restoring does not run any code that could fail.
    undo = [_restore_module(module) for module in _changeable_modules(model)]
    undo += [_restore_parameter(parameter) for _, parameter in base_parameters(model)]
    if (record := injection_state(model)) is not None:
        undo.append(_restore_record(record))
    try:
        yield
    except BaseException:
        for step in undo:
            step()
        raise


def _changeable_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the base and the stacks; adapters that are already there do not change."""
    for _, module in base_modules(model):
        yield module
        if isinstance(stack := module._modules.get("adapters"), AdapterContainer):
            yield stack


def _restore_module(module: nn.Module) -> Callable[[], None]:
    own, cls = vars(module), type(module)
    attributes = dict(own)
    # ``attributes`` refers to these dictionaries, which a change fills in place, so their contents are saved as well.
    contents = [(own[name], {**own[name]}) for name in _DICTS if own.get(name) is not None]

    def restore() -> None:
        object.__setattr__(module, "__class__", cls)
        own.clear()
        own.update(attributes)
        for there, before in contents:
            there.clear()
            there.update(before)

    return restore


def _restore_parameter(parameter: nn.Parameter) -> Callable[[], None]:
    data, trains = parameter.data, parameter.requires_grad  # a cast replaces ``data`` and leaves this tensor unchanged

    def restore() -> None:
        parameter.data = data
        parameter.requires_grad_(trains)

    return restore


def _restore_record(record: InjectionState) -> Callable[[], None]:
    own = vars(record)
    before = {name: copy.copy(value) for name, value in own.items()}
    before["report"] = record.report.copy()

    def restore() -> None:
        own.clear()
        own.update(before)

    return restore
