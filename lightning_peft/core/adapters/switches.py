"""The switches that decide which adapters of a module run, per thread or asyncio task.

:func:`lightning_peft.set_active` applies to all threads. A context such as ``lp.active`` or ``lp.rows`` applies only to
the thread that entered it. When backward repeats a checkpointed forward, possibly in another thread and after the
context has exited, the forward runs with the switches of its first run.
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
    """The switches of one stack.

    Attributes:
        active: names of the active adapters.
        disabled: whether all adapters are temporarily off.
        skipped: adapters that do not run on this module even if they are active.
        dispatcher: selects adapters for each row of the batch; None if all rows use the active adapters.
        batch_layout: how the host sees the batch, for the dispatcher.
        weight_adapters: the adapters that are applied to the host's weights before it runs, in order.
        wrapping_adapters: the other adapters, which run around the host, in order.
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
        """Return a copy with some attributes changed; call :meth:`AdapterStack.work_out` on it before use."""
        names = ("active", "disabled", "skipped", "dispatcher", "batch_layout")
        return Switches(**{**{name: getattr(self, name) for name in names}, **changes})


# By id of the stack. Each context sets a new mapping, because threads and tasks may hold the earlier one.
_OWN: ContextVar[Mapping[int, Switches]] = ContextVar("switches", default=MappingProxyType({}))


@contextmanager
def switched(changes: Mapping[AdapterStack, Mapping[str, Any]]) -> Iterator[None]:
    """Change the :class:`Switches` of stacks inside the context, for this thread or task only.

    Code compiled by ``torch.compile`` cannot read a ContextVar. It reads ``stack.local`` instead, so for compiled code
    the context applies to the whole thread.
    """
    own = {stack: current(stack).changed(**change) for stack, change in changes.items()}
    for stack, switches in own.items():
        stack.work_out(switches)
        stack.open.append(switches)  # so that attaching and deleting an adapter updates these switches as well
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
    """Return the switches of ``stack`` that apply to the calling code."""
    if torch.compiler.is_compiling():
        entered = getattr(stack.local, "entered", ())
        own = entered[-1] if entered else None
    elif in_backward() and (checkpoint := checkpoint_frame()) is not None:
        own = recall(checkpoint, id(stack))
    else:
        own = _OWN.get().get(id(stack))
        if own is None and len(stack.open) == 1 and in_backward() and _is_foreign():
            # A reentrant checkpoint leaves no frame to recall from, and runs in an autograd thread without this
            # thread's ContextVar. The thread inside the context waits for it, so its switches apply.
            own = stack.open[0]
    return stack.shared if own is None else own


def remember_switches(stack: AdapterStack, switches: Switches) -> None:
    """If a checkpointed forward is in progress, make its recomputation run with ``switches``."""
    if switches is not stack.shared and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        checkpoint = None if in_backward() else checkpoint_frame()
        if checkpoint is not None:
            remember(checkpoint, id(stack), switches)


def _is_foreign() -> bool:
    """Whether this thread was started outside of Python, as autograd's threads are."""
    return isinstance(threading.current_thread(), threading._DummyThread)
