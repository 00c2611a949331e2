"""Skip calls of frozen modules, and return their stored outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import add_mixin, remove_mixin
from lightning_peft.trainer.frozen_cache.first_batch import Call, CannotCache, Slot, with_slots

__all__ = ["Activations", "Replay"]


@dataclass
class Activations:
    """The outputs of a batch's calls that are needed to skip them.

    Attributes:
        shapes: for each call, the shape of each tensor without its rows.
        used: for each call, the tensors that are read, by position.
    """

    shapes: list[list[tuple[int, ...]]] = field(default_factory=list)
    used: list[dict[int, Tensor]] = field(default_factory=list)

    def add(self, call: Call, tensors: Sequence[Tensor]) -> None:
        """Append the output of one call."""
        self.shapes.append([tuple(tensor.shape[1:]) for tensor in tensors])
        # A copy, because an operation after the call may change the tensor in place.
        self.used.append({i: tensors[i].detach().clone() for i in sorted(call.used)})

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are read, in one order."""
        return [tensor for call in self.used for _, tensor in sorted(call.items())]


class Replay:
    """Changes the frozen modules of a model so that their calls can be skipped; :meth:`close` changes them back.

    Between :meth:`record` or :meth:`skip`, and :meth:`end`, the calls of one batch are recorded or skipped. At other
    times, and in all calls after the cut, the modules run as usual.

    Args:
        model: the module that trains.
        calls: the calls that can be skipped.
        counts: how often each frozen module is called in a batch.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], counts: dict[str, int]) -> None:
        self.calls = list(calls)
        self._which = {(call.module, call.index): i for i, call in enumerate(calls)}
        self._counts = counts
        self.modules = {name: model.get_submodule(name) for name in counts}
        inside = {name: stacks(self.modules[name]) for name in {call.module for call in calls}}
        self._stacks = [(stack, tuple(stack.active)) for found in inside.values() for stack in found.values()]
        self._rows = 0
        self._seen: dict[str, int] = {}
        self._nested = False
        self._given: Activations | None = None
        self._taken: Activations | None = None
        for name, module in self.modules.items():
            vars(module)["_frozen_replay"] = (self, name)
            add_mixin(module, Replayed, name)

    def close(self) -> None:
        """Give the modules their own classes back."""
        for module in self.modules.values():
            remove_mixin(module, Replayed)
            del vars(module)["_frozen_replay"]

    def record(self) -> None:
        """Run the calls of the next batch, and keep their outputs for :meth:`end`."""
        self._seen, self._given, self._taken = {}, None, Activations()

    def skip(self, activations: Activations, rows: int) -> None:
        """Skip the calls of the next batch."""
        self._seen, self._given, self._taken, self._rows = {}, activations, None, rows

    def end(self) -> Activations | None:
        """End the batch. Returns the recorded outputs; None if calls were skipped, or no forward ran.

        Raises:
            CannotCache: if the calls of this batch differ from those of the first batch.
        """
        taken, self._given, self._taken = self._taken, None, None
        if taken is None or not self._seen:
            return None
        if self._seen != self._counts or len(taken.used) != len(self.calls):
            raise CannotCache("the frozen modules were not called in the same way as in the first batch")
        return taken

    def call(self, name: str, forward: Any, args: Any, kwargs: Any) -> Any:
        """Answer one call of a module."""
        if self._nested or (self._given is None and self._taken is None):
            return forward(*args, **kwargs)
        index = self._seen.get(name, 0)
        self._seen[name] = index + 1
        which = self._which.get((name, index))
        if self._given is not None:
            if index >= self._counts[name]:
                raise CannotCache(f"{name!r} is called more often than in the first batch")
            if which is not None:
                self._check_adapters()
                return self._output(self.calls[which], self._given, which)
        self._nested = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._nested = False
        if self._taken is not None and which is not None:
            call = self.calls[which]
            template, tensors = with_slots(output)
            if template != call.output or which != len(self._taken.used):
                raise CannotCache(f"{name!r} returned {template}, but {call.output} in the first batch")
            self._taken.add(call, tensors)
        return output

    def _output(self, call: Call, given: Activations, which: int) -> Any:
        device = next(self.modules[call.module].parameters()).device

        def fill(slot: Slot) -> Tensor:
            if slot.position in given.used[which]:
                return given.used[which][slot.position].to(device)
            # Only skipped calls read this. If other code reads it, the NaN values make this visible.
            blank = float("nan") if slot.dtype.is_floating_point or slot.dtype.is_complex else 0
            shape = (self._rows, *given.shapes[which][slot.position])
            return torch.full((), blank, dtype=slot.dtype, device=device).expand(shape)

        return apply_to_collection(call.output, Slot, fill)

    def _check_adapters(self) -> None:
        for stack, active in self._stacks:
            if tuple(stack.active) != active:
                raise CannotCache(
                    "the active adapters in the frozen modules are not those with which the cache was filled"
                )


class Replayed:
    """The mixin of a module whose calls can be skipped."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        replay, name = vars(self)["_frozen_replay"]
        return replay.call(name, super().forward, args, kwargs)  # type: ignore[misc]
