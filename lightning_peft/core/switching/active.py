"""Activate and disable adapters, permanently or inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.adapters.lookup import check_known, check_unmerged, stacks
from lightning_peft.core.adapters.switches import switched

__all__ = ["active", "deactivate", "disabled", "set_active"]


def set_active(model: nn.Module, *names: str) -> None:
    """Activate exactly the adapters ``names``. ``requires_grad`` does not change.

    Raises:
        ValueError: if the model does not have an adapter of that name, or adapters are merged into the base.
    """
    check_known(model, *names)
    check_unmerged(model)
    for stack in stacks(model).values():
        stack.active = stack.names_in_order(names)
        stack.refresh()


def deactivate(model: nn.Module, name: str) -> None:
    """Deactivate the adapter ``name``; other adapters are unchanged."""
    for stack in stacks(model).values():
        stack.deactivate_adapter(name)


@contextmanager
def active(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside the context, only the adapters ``names`` are active, for the thread or task that entered it.

    Raises:
        ValueError: if the model does not have an adapter of that name, or adapters are merged into the base.
    """
    check_known(model, *names)
    check_unmerged(model)
    with switched({stack: {"active": stack.names_in_order(names)} for stack in stacks(model).values()}):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the context, the model runs without adapters, as its base does, for this thread or task.

    Raises:
        ValueError: if adapters are merged into the base, because they cannot be turned off.
    """
    check_unmerged(model)
    with switched({stack: {"disabled": True} for stack in stacks(model).values()}):
        yield
