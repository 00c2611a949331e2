"""Check a ``forward`` that is set on a module after it got adapters: it must still run them.

A ``forward`` set before the adapters runs inside them (:class:`lightning_peft.core.class_swap.OwnForward`). One that is
set later is called first. If it wraps the earlier ``forward``, the adapters run; if it replaces it, for example with a
fused kernel, they would silently do nothing. The two cannot be distinguished without calling it.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_peft.core.class_swap import OwnForward, has_mixin, original_class

__all__ = ["set_forward"]


def set_forward(host: nn.Module, forward: Callable[..., Any]) -> None:
    """Set ``forward`` on ``host``, to run around its adapters; the class's own forward removes an earlier one."""
    classes = [
        c.__dict__["forward"].__code__ for c in type(host).__mro__ if hasattr(c.__dict__.get("forward"), "__code__")
    ]
    if isinstance(forward, types.MethodType) and forward.__self__ is host and forward.__func__.__code__ in classes:
        vars(host).pop("forward", None)
        if has_mixin(host, OwnForward) and forward.__func__ is original_class(host).forward:  # type: ignore[attr-defined]
            vars(host)["_own_forward"] = forward
    else:
        vars(host)["forward"] = _UnverifiedForward(host, forward)


_LOCK = threading.RLock()  # verification replaces ``stack.run``, so only one thread may do it at a time


class _UnverifiedForward:
    """Calls ``forward``, and checks in the first call with active adapters that it runs them."""

    def __init__(self, host: Any, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self.host, self.forward = host, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.host.adapters
        if torch.compiler.is_compiling() or not (stack.running() or stack.dispatcher is not None):
            return self.forward(*args, **kwargs)
        with _LOCK:
            return self._verify(stack, args, kwargs)

    def _verify(self, stack: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        called: list[bool] = []
        run = stack.run

        def watched(*args: Any) -> Any:
            called.append(True)
            return run(*args)

        vars(stack)["run"] = watched
        try:
            output = self.forward(*args, **kwargs)
        finally:
            vars(stack).pop("run", None)  # already gone if ``forward`` called the module again
        if not called:
            raise RuntimeError(
                f"the adapters of a {type(self.host).__name__} did not run: its forward was replaced on the instance "
                "after they were attached, with one that does not call the earlier forward. Replace it before applying "
                "methods"
            )
        vars(self.host)["forward"] = self.forward
        return output
