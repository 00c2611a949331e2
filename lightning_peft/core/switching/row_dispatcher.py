"""Run each row of a batch with its adapters; :mod:`lightning_peft.core.switching.rows` installs the dispatcher."""

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
from lightning_peft.core.batching.batched import BatchedAdapters
from lightning_peft.core.batching.layout import BatchLayout, RowError, batch_dims, check_experts, row_dim, take
from lightning_peft.core.batching.recurrent import is_recurrent, split_recurrent
from lightning_peft.core.batching.split import split
from lightning_peft.core.checkpoint_frame import checkpoint_frame, in_backward, recall, remember
from lightning_peft.core.module_io import tensors_in

__all__ = ["AroundHosts", "RowDispatcher"]

Rows = tuple[tuple[str, ...], ...]
#: a host keeps its plans for this many combinations of rows after their contexts have exited
_MIXES = 8


@dataclass
class _Plan:
    """How one host serves the rows. Only one of the three attributes is set.

    Attributes:
        all: the adapters of every row, if all rows have the same.
        groups: groups of rows with the same adapters, if the host must run once for each group.
        batched: the object that serves all rows in one run.
    """

    all: tuple[str, ...] | None = None
    groups: list[tuple[int, ...]] = field(default_factory=list)
    batched: list[Any] = field(default_factory=list)


class RowDispatcher:
    """Holds the adapters of each row, and decides how each host runs them.

    Args:
        rows: the names of each row's adapters.
        repeats: the number of entries of the batch per row.
        spanning: the names of adapters that span hosts and that only some rows have.
        root: the module around all hosts of these, whose forward runs once for each group of rows with the same ones.
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
        # True after a forward in train mode without gradients: reentrant checkpointing runs its first pass like that,
        # and leaves no frame from which a recomputation could recall its rows.
        self.saw_no_grad_forward = False
        #: the plans that this context has used, so that close() frees the stacked factors that they keep between calls
        self._plans: dict[Any, _Plan] = {}

    def run(self, host: Any, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the output of an adapted module, with its adapters applied to each row."""
        stack = cast(AdapterStack, host.adapters)
        if (found := self._in_force(host, stack)) is None:
            return stack.run_active(host, forward, args, kwargs)
        dispatcher, rows = found
        if dispatcher is self and rows is self.rows:
            return self._route(host, forward, args, kwargs)
        with dispatcher.inside(rows):
            return dispatcher._route(host, forward, args, kwargs)

    def _in_force(self, host: nn.Module, stack: AdapterStack) -> tuple[RowDispatcher, Rows] | None:
        """Return the dispatcher and rows that apply to this run of ``host``; None if all rows use the active adapters.

        This object does not always apply: backward repeats checkpointed forwards, usually after the context has exited
        and possibly inside another one. Such a run must use the rows of the forward that it repeats.
        """
        now = (self, self.rows) if self.open else None
        if torch.compiler.is_compiling():
            return now
        if in_backward():
            if (checkpoint := checkpoint_frame()) is not None:
                return cast("tuple[RowDispatcher, Rows] | None", recall(checkpoint, "rows"))
            if not self.open and self.saw_no_grad_forward:
                raise RowError(
                    f"{stack.batch_layout} is recomputed in backward after lp.rows has exited, so the adapters of its "
                    "rows are unknown: call backward inside the context, or checkpoint with use_reentrant=False"
                )
        elif not self.open:  # a new forward outside of the context: the next backward no longer repeats one inside it
            self.saw_no_grad_forward = False
        elif torch.is_grad_enabled():
            if (checkpoint := checkpoint_frame()) is not None:
                remember(checkpoint, "rows", now)
        else:
            self.saw_no_grad_forward = self.saw_no_grad_forward or host.training
        return now

    def names_to_read(self, host: Any) -> tuple[str, ...] | None:
        """Return the adapters that a read of the host's weight must include; None if they differ between rows."""
        stack = cast(AdapterStack, host.adapters)
        if (found := self._in_force(host, stack)) is None:
            return stack.active
        dispatcher, rows = found
        with dispatcher.inside(rows):
            return dispatcher._planned(host, stack).all

    def close(self) -> None:
        """Exit the context: from now on, only recomputations of forwards that ran inside it are routed."""
        self.open = False
        for plan in self._plans.values():
            for batched in plan.batched:
                if isinstance(batched, BatchedAdapters):
                    batched.close()
        self._plans.clear()

    @contextmanager
    def inside(self, rows: Rows) -> Iterator[None]:
        """Inside the context, the batch consists of these rows."""
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
            # _route again, now with the rows of one group: they have equal adapters, or can be batched.
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
        """Return the output of a module that runs once for each group of rows."""

        stack = cast(dict[str, Adapter], getattr(module, "adapters", {}))
        captures = [
            (capture, capture.captured)
            for adapter in stack.values()
            for capture in adapter.captures
            if capture.captured is not None
        ]

        def of_group(i: int, args: tuple, kwargs: dict[str, Any]) -> Any:
            for capture, x in captures:  # it captured the input of all rows, but this run needs the group's part
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
        """Return the output of a module around all hosts; the outermost one that is called checks the batch."""
        batch_layout = self.around.get(module)
        if batch_layout is None:  # it was around all hosts in an earlier context, with other adapters
            return forward(*args, **kwargs)
        outer, self._is_inside = self._is_inside, True
        try:
            if not outer and not in_backward():  # backward only repeats parts of a forward that was checked
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
        # Both sizes are valid: generate runs an encoder before it repeats the rows.
        if not {self.n, self.n * self.repeats}.intersection(sizes):
            raise RowError(
                f"{batch_layout} was called with a batch of {sizes[0]} (a tensor of shape {tuple(x.shape)}) "
                f"for {self.n} names{self._advice(sizes)}"
            )

    def _advice(self, sizes: list[int]) -> str:
        if self.repeats > 1:
            return f" with repeats={self.repeats}: it must be {self.n} or {self.n * self.repeats}"
        each = next((size // self.n for size in sizes if size and size % self.n == 0), None)
        only = ": pass as many names as the batch has rows"
        return only if each is None else f"{only}, or repeats={each} if each name stands for {each} in a row (beams)"

    def span(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the output of the module around all hosts of adapters that span several hosts.

        It runs once for each group of rows with the same such adapters, because they change the sequence between hosts.
        """
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
            # The stack keeps the plans of recent combinations, because each decoding step may enter its own context.
            known = stack.row_plans if not torch.compiler.is_compiling() else {}
            full = (*key, self.spanning, self.root)
            if full not in known:
                if len(known) >= _MIXES:
                    known.clear()
                known[full] = self._plan(host, stack)
            self._plans[key] = known[full]
        return self._plans[key]

    def _plan(self, host: nn.Module, stack: AdapterStack) -> _Plan:
        skipped = stack.skipped
        ordered = {row: tuple(n for n in stack.names_in_order(row) if n not in skipped) for row in set(self.rows)}
        here = [ordered[row] for row in self.rows]
        if len(set(here)) == 1:
            return _Plan(all=here[0])
        names = stack.names_in_order({name for row in here for name in row})
        classes = {name: _batched_class(cast(Adapter, stack[name]), host) for name in names}
        spanning = {self.spanning.intersection(row) for row in here}
        if self.root is not None and len(spanning) > 1:
            raise RowError(
                f"{sorted(frozenset().union(*spanning))} change the sequence between several modules, so rows with "
                f"different adapters must run separately, which happens in the forward of {self.root}. It was not "
                "called: call it instead of modules inside it"
            )
        # All rows whose adapters can be batched form one group; every other combination of adapters forms its own.
        apart: dict[tuple[str, ...], list[int]] = {}
        for i, row in enumerate(here):
            apart.setdefault(row if any(classes[name] is None for name in row) else (), []).append(i)
        if any(classes[name] is None for name in names):
            return _Plan(groups=[tuple(rows) for rows in apart.values()])
        return _Plan(batched=self._batched(host, stack, here, classes))

    def _batched(
        self, host: nn.Module, stack: AdapterStack, here: list[tuple[str, ...]], kinds: dict[str, Any]
    ) -> list:
        """Return the batched adapters, in the order in which they run.

        Each adapter joins the first group of its type that runs after all earlier adapters of its rows, so that every
        row sees its adapters in order.
        """
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
        # If one adapter serves all rows, it runs directly.
        same = [len(set(map(id, adapters))) == 1 for _, adapters in members]
        return [a[0] if one else kind(stack.batch_layout, a) for (kind, a), one in zip(members, same)]

    def _check_length(self, batch_layout: BatchLayout, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse a batch that is not a multiple of the rows on a host where all rows have the same adapters.

        The host could run, but the mistake would go unnoticed.
        """
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), None)
        n = len(self.rows)
        if x is None or x.shape[0] == 1 or (x.ndim == 1 and not x.is_floating_point()):
            return  # the batch size is unknown, or all rows share a table
        if all(size % n for size in x.shape[:2]):
            row_dim(batch_layout, x, n)  # raises the error


def _batched_class(adapter: Adapter, host: nn.Module) -> Any:
    # Parameter overrides change what the host itself computes, so it must run once for each adapter that has them.
    return adapter.batched_class(host) if adapter.replacement is None else None


class AroundHosts(nn.Module):
    """Mixin for the modules around all hosts: checks the batch, and splits it for adapters that span hosts.

    It is not removed when the context exits, because other threads may be running the module. For the same reason it is
    not a hook. Outside of a context it calls the module's own forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dispatcher = self.__dict__["_peft_rows_stack"].dispatcher
        if dispatcher is None or not dispatcher.open:
            return super().forward(*args, **kwargs)
        return dispatcher.run_around(self, super().forward, args, kwargs)
