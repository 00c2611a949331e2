"""Call a function after each step of the optimizer that holds a method's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

__all__ = ["StepHook", "holds_any"]


def holds_any(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ``optimizer`` has one of ``parameters``."""
    own = {id(parameter) for parameter in parameters}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


class StepHook:
    """A function that runs after each optimizer step, until :meth:`remove`. A copy of the object has no hook.

    The Trainer's hook at the end of a batch would be too late: gradients may be cleared by then, and a step that the
    gradient scaler skips must not count.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def attach(
        self, method: str, optimizers: Iterable[Any], parameters: Iterable[nn.Parameter], call: Callable[[], None]
    ) -> None:
        """Run ``call`` after each step of the one optimizer that holds ``parameters``.

        Args:
            method: the method's name, for errors.
            optimizers: the optimizers of a run.
            parameters: the parameters whose steps are counted.
            call: the function.

        Raises:
            MisconfigurationException: if not exactly one torch optimizer holds them.
        """
        self.remove()
        parameters = list(parameters)
        holders = [optimizer for optimizer in optimizers if holds_any(optimizer, parameters)]
        if len(holders) != 1 or not isinstance(holders[0], Optimizer):
            raise MisconfigurationException(
                f"{method} needs exactly one torch optimizer that holds its parameters, whose steps it counts; found "
                f"{len(holders)}. Put all {method} parameters into one optimizer"
            )
        self._handle = holders[0].register_step_post_hook(lambda *_: call())

    def remove(self) -> None:
        """Remove the hook, if there is one."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_handle": None}  # the hook belongs to this object's optimizer
