"""Which adapters of a module run, for one thread (or task) apart from the others.

What :func:`lightning_peft.set_active` decides holds for all threads. A context such as ``lp.active`` or ``lp.rows``
holds for the thread that entered it. Checkpointed forwards that backward repeats, in whichever thread and after the
context was left, run as they ran the first time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.core.checkpoint_frame import checkpoint_frame, in_backward, recall, remember

if TYPE_CHECKING:
    from lightning_peft.core.adapters.base import Adapter
    from lightning_peft.core.adapters.stack import AdapterStack
__all__ = ["Switches", "current", "remember_switches", "switched"]


class Switches:
    """Which adapters of one stack run.

    Attributes:
        active: names of the adapters that take part.
        disabled: whether none does, for the time being.
        skipped: the adapters that are left out here, whatever is active.
        dispatcher: what chooses the adapters for each row of the batch; None where all rows have the active ones.
        batch_layout: where the dispatcher finds the rows.
        weight_adapters: the adapters that run with their weights in place of the host's, in order.
        wrapping_adapters: the adapters that run around the host after these.
    """

    weight_adapters: tuple[Adapter, ...] = ()
    wrapping_adapters: tuple[Adapter, ...] = ()

    def __init__(
        self,
        active: tuple[str, ...] = (),
        disabled: bool = False,
        skipped: tuple[str, ...] = (),
        dispatcher: Any = None,
        batch_layout: Any = None,
    ) -> None:
        self.active, self.disabled, self.skipped = active, disabled, skipped
        self.dispatcher, self.batch_layout = dispatcher, batch_layout

    def changed(self, **changes: Any) -> Switches:
        """A copy with some attributes changed; what runs is to be worked out anew."""
        names = ("active", "disabled", "skipped", "dispatcher", "batch_layout")
        return Switches(**{**{name: getattr(self, name) for name in names}, **changes})


# By id of the stack. A copy for each context.
_OWN: ContextVar[Mapping[int, Switches]] = ContextVar("switches", default=MappingProxyType({}))


@contextmanager
def switched(changes: Mapping[AdapterStack, Mapping[str, Any]]) -> Iterator[None]:
    """Within the context, and in this thread or task only, stacks have other :class:`Switches`.

    Code compiled by ``torch.compile`` cannot read a ContextVar: for it, the context holds for the whole thread.
    """
    own = {stack: current(stack).changed(**change) for stack, change in changes.items()}
    for stack, switches in own.items():
        stack.work_out(switches)
        stack.open.append(switches)
        stack.local.entered = (*getattr(stack.local, "entered", ()), switches)
    token = _OWN.set({**_OWN.get(), **{id(stack): switches for stack, switches in own.items()}})
    try:
        yield
    finally:
        _OWN.reset(token)
        for stack, switches in own.items():
            stack.local.entered = tuple(other for other in stack.local.entered if other is not switches)
            stack.open.remove(switches)


def current(stack: AdapterStack) -> Switches:
    """The switches of ``stack`` for the code that asks."""
    if torch.compiler.is_compiling():
        entered = getattr(stack.local, "entered", ())
        own = entered[-1] if entered else None
    elif in_backward() and (checkpoint := checkpoint_frame()) is not None:
        own = recall(checkpoint, id(stack))
    else:
        own = _OWN.get().get(id(stack))
        if own is None and len(stack.open) == 1 and in_backward() and _is_foreign():
            # A reentrant checkpoint in a thread of autograd's own, which the context's thread is waiting for.
            own = stack.open[0]
    return stack.shared if own is None else own


def remember_switches(stack: AdapterStack, switches: Switches) -> None:
    """If a checkpointed forward is in progress, its repetition will run with ``switches``."""
    if switches is not stack.shared and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        checkpoint = None if in_backward() else checkpoint_frame()
        if checkpoint is not None:
            remember(checkpoint, id(stack), switches)


def _is_foreign() -> bool:
    """Whether this thread was not started by Python."""
    return isinstance(threading.current_thread(), threading._DummyThread)
