"""Which adapters run: set, for good or inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_peft.core.adapters.lookup import check_known, check_unmerged, stacks
from lightning_peft.core.adapters.switches import switched

__all__ = ["active", "deactivate", "disabled", "set_active"]


def set_active(model: nn.Module, *names: str) -> None:
    """Let exactly the adapters called ``names`` take part; what trains does not change.

    Raises:
        ValueError: the model has no adapter of that name, or some that are merged into the base.
    """
    check_known(model, *names)
    check_unmerged(model)
    for stack in stacks(model).values():
        stack.active = tuple(n for n in stack if n in names)
        stack.refresh()


def deactivate(model: nn.Module, name: str) -> None:
    """Let the adapter called ``name`` take no part; the others stay as they are."""
    for stack in stacks(model).values():
        stack.active = tuple(n for n in stack.active if n != name)
        stack.refresh()


@contextmanager
def active(model: nn.Module, *names: str) -> Iterator[None]:
    """Within the context only the adapters called ``names`` take part, for the thread or task that entered it."""
    check_known(model, *names)
    check_unmerged(model)
    with switched({stack: {"active": tuple(n for n in stack if n in names)} for stack in stacks(model).values()}):
        yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the context no adapter takes part: the model computes what its base computes, for this thread or task.

    Raises:
        ValueError: adapters are merged into the base, so that it cannot be had without them.
    """
    check_unmerged(model)
    with switched({stack: {"disabled": True} for stack in stacks(model).values()}):
        yield
