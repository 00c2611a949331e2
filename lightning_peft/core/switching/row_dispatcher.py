"""Runs each row of a batch with the adapters it names; :mod:`lightning_peft.core.switching.rows` puts it in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.batching.layout import BatchLayout, RowError, batch_dims, check_experts, row_dim, take
from lightning_peft.core.batching.recurrent import is_recurrent, split_recurrent
from lightning_peft.core.batching.split import split
from lightning_peft.core.checkpoint_frame import checkpoint_frame, in_backward, recall, remember
from lightning_peft.core.module_io import tensors_in

__all__ = ["AroundHosts", "RowDispatcher"]

Rows = tuple[tuple[str, ...], ...]


@dataclass
class _Plan:
    """How one host serves the rows.

    Attributes:
        all: the adapters that every row has, where they are the same for all.
        groups: rows that need a run of the host of their own, each group with the same adapters.
        batched: what serves all rows in one run.
    """

    all: tuple[str, ...] | None = None
    groups: list[tuple[int, ...]] = field(default_factory=list)
    batched: list[Any] = field(default_factory=list)


class RowDispatcher:
    """The adapters of each row, and how the hosts serve them.

    Args:
        rows: the names of each row's adapters.
        repeats: how many entries of the batch each row has.
        spanning: the names of adapters that span hosts and not all rows have.
        root: the module around all their hosts, whose forward runs once for each group of rows with the same ones.
    """

    def __init__(
        self, rows: Rows, repeats: int = 1, spanning: frozenset[str] = frozenset(), root: BatchLayout | None = None
    ) -> None:
        self.rows = rows
        self.n, self.repeats = len(rows), repeats
        self.spanning = spanning
        self.root = root
        self.open = True
        self.around: dict[nn.Module, BatchLayout] = {}  # the modules around all hosts
        self._is_inside = False  # whether one of these is running
        self.saw_no_grad_forward = False  # in training, as reentrant checkpointing does
        self._plans: dict[tuple[BatchLayout, Rows, tuple[str, ...]], _Plan] = {}

    def run(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of an adapted module, each row with its adapters."""
        stack = cast(AdapterStack, host.adapters)
        if (found := self._in_force(host, stack)) is None:
            return stack.run_active(host, forward, args, kwargs)
        dispatcher, rows = found
        if dispatcher is self and rows is self.rows:
            return self._route(host, forward, args, kwargs)
        with dispatcher.inside(rows):
            return dispatcher._route(host, forward, args, kwargs)

    def _in_force(self, host: nn.Module, stack: AdapterStack) -> tuple[RowDispatcher, Rows] | None:
        """The dispatcher and the rows that a run of ``host`` has now; None if all rows have the active adapters."""
        now = (self, self.rows) if self.open else None
        if torch.compiler.is_compiling():
            return now
        if in_backward():
            if (checkpoint := checkpoint_frame()) is not None:
                return cast("tuple[RowDispatcher, Rows] | None", recall(checkpoint, "rows"))
            if not self.open and self.saw_no_grad_forward:
                raise RowError(
                    f"{stack.batch_layout} is run again in backward, after lp.rows was left, and which row has which "
                    "adapter cannot be known: call backward inside the context, or checkpoint with use_reentrant=False"
                )
        elif not self.open:
            self.saw_no_grad_forward = False
        elif torch.is_grad_enabled():
            if (checkpoint := checkpoint_frame()) is not None:
                remember(checkpoint, "rows", now)
        else:
            self.saw_no_grad_forward = self.saw_no_grad_forward or host.training
        return now

    def names_to_read(self, host: Any) -> tuple[str, ...] | None:
        """The adapters that a value of the host has for code that reads it; None if the rows have different ones."""
        stack = cast(AdapterStack, host.adapters)
        if (found := self._in_force(host, stack)) is None:
            return stack.active
        dispatcher, rows = found
        with dispatcher.inside(rows):
            return dispatcher._planned(host, stack).all

    def close(self) -> None:
        """Leave the context: from now on only recomputations of what ran inside are routed."""
        self.open = False
        self._plans.clear()  # with the factors they keep

    @contextmanager
    def inside(self, rows: Rows) -> Iterator[None]:
        """Within the context the batch has these rows."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def _route(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        stack = cast(AdapterStack, host.adapters)
        plan = self._planned(host, stack)
        if plan.all is not None:
            self._check_length(stack.batch_layout, args, kwargs)
            return stack.run_as(plan.all, host, forward, args, kwargs)
        check_experts(stack.batch_layout, (*args, *kwargs.values()), len(self.rows))
        if plan.groups:
            return self.split(
                stack.batch_layout, host, plan.groups, functools.partial(self._route, host, forward), args, kwargs
            )
        call = forward
        for batched in plan.batched:
            call = functools.partial(batched.run, host, call)
        return call(*args, **kwargs)

    def split(
        self,
        batch_layout: BatchLayout,
        module: nn.Module,
        groups: list[tuple[int, ...]],
        call: Callable[[tuple, dict[str, Any]], Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """The output of a module that runs once for each group of rows."""

        stack = cast(dict[str, Adapter], getattr(module, "adapters", {}))
        captures = [
            (capture, capture.captured)
            for adapter in stack.values()
            for capture in adapter.captures
            if capture.captured is not None
        ]

        def of_group(i: int, args: tuple, kwargs: dict[str, Any]) -> Any:
            for capture, x in captures:  # it holds the input of all rows
                capture.captured = take(x, row_dim(batch_layout, x, len(self.rows)), groups[i], len(self.rows))
            with self.inside(tuple(self.rows[row] for row in groups[i])):
                return call(args, kwargs)

        try:
            divide = split_recurrent if is_recurrent(module) else split
            return divide(batch_layout, module, groups, of_group, args, kwargs)
        finally:
            for capture, _ in captures:
                capture.captured = None

    def run_around(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a module around all hosts; the outermost one that is called checks the batch."""
        batch_layout = self.around.get(module)
        if batch_layout is None:  # it was around all hosts when others were there
            return forward(*args, **kwargs)
        outer, self._is_inside = self._is_inside, True
        try:
            if not outer and not in_backward():  # which repeats parts of a forward that was checked
                self._check_batch(batch_layout, args, kwargs)
            if self.root is not None and batch_layout.name == self.root.name:
                return self.span(module, forward, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self._is_inside = outer

    def _check_batch(self, batch_layout: BatchLayout, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse a batch whose size does not fit the rows."""
        values = (*args, *kwargs.values())
        given = [t for t in tensors_in(values) if t.ndim]
        x = next((t for t in given if t.ndim > 1), given[0] if given else None)
        if x is None:
            return
        packed = next((v for v in values if isinstance(v, PackedSequence)), None)
        sizes = [int(packed.batch_sizes[0])] if packed else [x.shape[dim] for dim in batch_dims(batch_layout, x)]
        # generate runs an encoder before it repeats the rows
        if not {self.n, self.n * self.repeats}.intersection(sizes):
            raise RowError(
                f"{batch_layout} was called with a batch of {sizes[0]} (a tensor of shape {tuple(x.shape)}) "
                f"for {self.n} names{self._advice(sizes)}"
            )

    def _advice(self, sizes: list[int]) -> str:
        if self.repeats > 1:
            return f" with repeats={self.repeats}: it must be {self.n} or {self.n * self.repeats}"
        each = next((size // self.n for size in sizes if size and size % self.n == 0), None)
        only = ": give as many names as the batch has rows"
        return only if each is None else f"{only}, or repeats={each} if each name stands for {each} in a row (beams)"

    def span(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of the module around all hosts of adapters that span several."""
        groups: dict[frozenset[str], list[int]] = {}
        for i, row in enumerate(self.rows):
            groups.setdefault(self.spanning.intersection(row), []).append(i)
        if len(groups) == 1:
            return forward(*args, **kwargs)
        assert self.root is not None
        rows = [tuple(group) for group in groups.values()]
        return self.split(self.root, module, rows, lambda args, kwargs: forward(*args, **kwargs), args, kwargs)

    def _planned(self, host: nn.Module, stack: AdapterStack) -> _Plan:
        key = stack.batch_layout, self.rows, stack.skipped
        if key not in self._plans:
            self._plans[key] = self._plan(host, stack)
        return self._plans[key]

    def _plan(self, host: nn.Module, stack: AdapterStack) -> _Plan:
        order = {name: i for i, name in enumerate(stack) if name not in stack.skipped}
        here = [tuple(sorted((n for n in row if n in order), key=order.__getitem__)) for row in self.rows]
        if len(set(here)) == 1:
            return _Plan(all=here[0])
        names = sorted({name for row in here for name in row}, key=order.__getitem__)
        classes = {name: _batched_class(cast(Adapter, stack[name]), host) for name in names}
        spanning = {self.spanning.intersection(row) for row in here}
        if self.root is not None and len(spanning) > 1:
            raise RowError(
                f"{sorted(frozenset().union(*spanning))} work on the sequence between several modules, so that rows "
                f"with other adapters must pass these apart; that happens in the forward of {self.root}, which was not "
                "called"
            )
        apart: dict[tuple[str, ...], list[int]] = {}
        for i, row in enumerate(here):
            apart.setdefault(row if any(classes[name] is None for name in row) else (), []).append(i)
        if any(classes[name] is None for name in names):
            return _Plan(groups=[tuple(rows) for rows in apart.values()])
        return _Plan(batched=self._batched(host, stack, here, classes))

    def _batched(
        self, host: nn.Module, stack: AdapterStack, here: list[tuple[str, ...]], kinds: dict[str, Any]
    ) -> list:
        """The batched adapters in order: each joins the earliest of its kind that comes after all others of its
        rows."""
        members: list[tuple[Any, list[Any]]] = []
        last = [-1] * len(here)
        for name, kind in kinds.items():
            rows = [i for i, row in enumerate(here) if name in row]
            after = max(last[i] for i in rows)
            at = next((i for i, (other, _) in enumerate(members) if i > after and other == kind), len(members))
            if at == len(members):
                members.append((kind, [None] * len(here)))
            for i in rows:
                members[at][1][i] = stack[name]
                last[i] = at
        # One adapter that serves all rows needs no batching.
        same = [len(set(map(id, adapters))) == 1 for _, adapters in members]
        return [a[0] if one else kind(stack.batch_layout, a) for (kind, a), one in zip(members, same)]

    def _check_length(self, batch_layout: BatchLayout, args: tuple, kwargs: dict[str, Any]) -> None:
        """A batch that is no multiple of the rows, at a host where all rows have the same adapters."""
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
        n = len(self.rows)
        if x is None or x.shape[0] == 1 or (x.ndim == 1 and not x.is_floating_point()):
            return  # nothing to tell by, or a table that all rows share
        if all(size % n for size in x.shape[:2]):
            row_dim(batch_layout, x, n)  # says what is wrong


def _batched_class(adapter: Adapter, host: nn.Module) -> Any:
    # Copies of the host's own parameters are for a run of the host.
    return adapter.batched_class(host) if adapter.replacement is None else None


class AroundHosts(nn.Module):
    """Mixin of the modules around all adapted ones: checks the batch, and splits it for adapters that span hosts.

    It stays when the context is left, since other threads may be running the module, and torch's hooks cannot be
    added or removed meanwhile either. Outside of a context it calls the module's own forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dispatcher = self.__dict__["_peft_rows_stack"].dispatcher
        if dispatcher is None or not dispatcher.open:
            return super().forward(*args, **kwargs)
        return dispatcher.run_around(self, super().forward, args, kwargs)
