"""Run the training steps of several adapters so that they share one pass of the network.

The step of the first adapter runs until it calls the network. Inside this call, the step of the next adapter runs until
its own call, and so on. The call of the last adapter runs the network once for the rows of all adapters. Then each step
continues with its part of the output, the last one first. No step runs twice, and all run in one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import adapter_names, stacks
from lightning_peft.core.adapters.switches import switched
from lightning_peft.core.batching.layout import batch_layouts
from lightning_peft.core.names import around_all
from lightning_peft.core.switching.rows import rows
from lightning_peft.core.targeting.base_modules import base_buffers
from lightning_peft.trainer.together.stacking import Call, NotPerRow, divide, leaves, stack, together

__all__ = ["CannotTrainTogether", "Meeting", "MeetingPoint"]

_FRAMES = 200  # Python frames between a step and its call of the network, with a margin for deeply nested models


class CannotTrainTogether(MisconfigurationException):
    """Adapters that share a pass would not end with the values that each has if it is trained alone.

    Args:
        why: the cause, and what to do.
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"TrainTogether: {why}")


class MeetingPoint(nn.Module):
    """Mixin for the innermost module around all adapters, where the steps meet."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        meeting: Meeting = self.__dict__["_peft_meeting"]
        if meeting.current is None:
            return super().forward(*args, **kwargs)
        return meeting.meet(args, kwargs)


class Meeting:
    """The place where the steps of all adapters meet.

    Args:
        model: the adapted model.

    Attributes:
        point: the module where steps meet.
        current: the name of the adapter whose step is running outside of the network; None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        found = stacks(model)
        around = around_all(found)
        while isinstance(model.get_submodule(around[-1]), nn.ModuleList | nn.ModuleDict):
            around.pop()  # a container is never called
        self.where = around[-1]
        self.point = model.get_submodule(self.where)
        self.batch_first = batch_layouts(model, [self.where])[self.where].order == "batch"
        self.current: str | None = None
        # Like lp.active, but prepared once, because it is entered for each adapter in each step.
        self._switches = {
            name: {stack: {"active": stack.names_in_order([name])} for stack in found.values()}
            for name in adapter_names(model)
        }
        self._steps: dict[str, Callable[[], Any]] = {}
        self._waiting: list[str] = []
        self._results: dict[str, Any] = {}
        self._calls: list[Call] = []
        self._state: tuple = ()
        self._random: list[Tensor] = []
        self._check = False
        self._warned: set[str] = set()

    def run(self, steps: Mapping[str, Callable[[], Any]], check: bool) -> dict[str, Any]:
        """Run the step of each adapter, and return their outputs by name.

        Args:
            steps: the step of each adapter, by the adapter's name.
            check: whether to compare the first adapter's outputs with those of a pass of its own.

        Raises:
            CannotTrainTogether: if a step draws random numbers or changes a buffer, or rows of the batch influence one
                another.
        """
        self._random, buffers = _random_state(), self._versions() if check else {}
        self._steps, self._waiting, self._results, self._calls = dict(steps), list(steps), {}, []
        self._state, self._check = _torch_state(), check
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + _FRAMES * len(steps))  # each step runs inside the previous one
        try:
            self._start_waiting()
        finally:
            sys.setrecursionlimit(limit)
            self.current, self._calls = None, []
        self._check_random()
        versions = self._versions() if check else {}
        if changed := [name for name, key in versions.items() if buffers.get(name, key) != key]:
            raise CannotTrainTogether(
                f"training_step changes the buffer {changed[0]!r}, which all adapters share: keep its module in eval "
                "mode, or train one adapter at a time"
            )
        return {name: self._results[name] for name in steps}

    def _check_random(self) -> None:
        if any(not torch.equal(a, b) for a, b in zip(self._random, _random_state())):
            raise CannotTrainTogether(
                "training_step draws random numbers (dropout, stochastic depth, noise), and an adapter that is trained "
                "alone would draw others: set dropout to 0, or call eval() on the base before the fit"
            )

    def only(self, name: str) -> AbstractContextManager[None]:
        """Inside the context, only the adapter ``name`` is active."""
        return switched(self._switches[name])

    def _start_waiting(self) -> None:
        while self._waiting:
            name = self.current = self._waiting.pop(0)
            with self.only(name):  # for calls of modules outside of the shared pass
                self._results[name] = self._steps[name]()

    def meet(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the output for a call of the network, from one pass for all adapters if that is possible."""
        name = self.current
        assert name is not None
        if (why := self._obstacle(name)) is not None:
            self._warn(why)
            return self._alone(args, kwargs)
        call = Call(name, self.point, args, kwargs)
        self._calls.append(call)
        self._start_waiting()
        if not call.done:
            self._run_all()
        self.current = name
        return call.output

    def _obstacle(self, name: str) -> str | None:
        """Return why the step of ``name`` cannot wait inside this call for the steps of the others; None if it can."""
        if any(call.name == name for call in self._calls):
            return f"training_step calls {self._name} several times, and only the first calls meet"
        if _torch_state() != self._state:
            return (
                f"training_step calls {self._name} inside a context (no_grad, autocast, checkpoint) that would apply "
                "to the steps of the other adapters too"
            )
        return None if self.batch_first else f"{self._name} may get inputs whose first dimension is not the batch"

    def _run_all(self) -> None:
        self.current = None
        for group in together(self._calls):
            if len(group) == 1 or not self._run_group(group):
                for call in group:
                    with self.only(call.name):
                        call.output = self.point(*call.args, **call.kwargs)
                    call.done = True
        if len(self._calls) > 1 and all(len(group) == 1 for group in together(self._calls)):
            self._warn("the batches of the adapters have different shapes or dtypes: pad them to one length")

    def _run_group(self, group: list[Call]) -> bool:
        """Run one pass for the calls of ``group``; return False if its output cannot be divided."""
        args, kwargs = stack(group)
        with rows(self.model, [call.name for call in group for _ in range(call.rows)]):
            output = self.point(*args, **kwargs)
        try:
            parts = divide(output, [call.rows for call in group])
        except NotPerRow as error:
            self._warn(f"{self._name} cannot serve all adapters in one pass: {error}. Compute the loss outside of it")
            return False
        for call, part in zip(group, parts):
            call.output, call.done = part, True
        if self._check:
            self._check_random()  # first, because random numbers would also make the outputs differ
            self._compare(group[0])
        return True

    @torch.no_grad()
    def _compare(self, call: Call) -> None:
        with self.only(call.name):
            alone = leaves(self.point(*call.args, **call.kwargs))
        shared = leaves(call.output)
        bound = _rounding([*shared, *self.point.parameters()])
        for a, b in zip(alone, shared):
            close = a.shape == b.shape and (
                not a.is_floating_point() or float((a - b).abs().max()) <= bound * max(1e-6, float(a.abs().max()))
            )
            if not close:
                raise CannotTrainTogether(
                    f"the outputs of {self._name} for the adapter {call.name!r} are not those of a pass of its own: "
                    "rows of the batch influence one another (batch norm, a statistic over the batch). Train these "
                    "adapters one at a time"
                )

    def _alone(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        name, self.current = self.current, None
        try:
            return self.point(*args, **kwargs)
        finally:
            self.current = name

    @property
    def _name(self) -> str:
        return repr(self.where) if self.where else "the module"

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            rank_zero_warn(f"TrainTogether: the base runs once for each adapter, because {why}")

    def _versions(self) -> dict[str, Any]:
        return {name: (id(buffer), buffer._version) for name, buffer in base_buffers(self.model)}


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _torch_state() -> tuple:
    """The state of torch that contexts such as ``no_grad``, autocast and checkpointing change."""
    kinds = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        torch._C._len_torch_function_stack(),
    )


def _rounding(tensors: list[Tensor]) -> float:
    """The relative difference that rounding in the coarsest of the dtypes may cause in a deep network."""
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    kinds |= {torch.get_autocast_dtype(k) for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0) ** 0.5
