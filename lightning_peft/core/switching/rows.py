"""One adapter, several or none for each row of a batch.

Low-rank updates of linear layers are computed for all rows together, by two batched products. Adapters that work on a
module's output are called once each, on their rows. Prefixes and prompts are padded and masked. For all others the
module they sit on, or the one around all of them, runs once for each group of rows with the same adapters.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.adapters.switches import current, switched
from lightning_peft.core.batching.layout import BatchLayout, RowError, batch_dims, batch_layouts
from lightning_peft.core.class_swap import add_mixin, remove_mixin
from lightning_peft.core.module_io import tensors_in
from lightning_peft.core.names import around_all, nearest
from lightning_peft.core.record import injection_state
from lightning_peft.core.switching.row_dispatcher import RowDispatcher, Rows, SplitAtRoot

__all__ = ["rows"]


@contextmanager
def rows(model: nn.Module, names: Sequence[str | Sequence[str] | None] | None, repeats: int = 1) -> Iterator[None]:
    """Within the context each row of a batch runs with the adapters it names, in training and in inference.

    The context holds for the thread or task that entered it.

    The result is that of one pass for each row with only its adapters active, up to rounding. What is active otherwise
    makes no difference.

    The outermost module called, of those around all adapters, must get one entry for each name, or ``repeats`` of them.
    Modules inside it may see more for each row (windows, flattened tokens), row by row.

    Args:
        model: an adapted model.
        names: for each row the name of an adapter, several names, or None for the base. None for all of them leaves the
            model as it is, so that ``batch.get("adapters")`` can be passed.
        repeats: how many entries of the batch stand for each name, one after the other: in ``generate`` the larger of
            ``num_beams`` and ``num_return_sequences``.

    Raises:
        RowError: a name that no adapter has; adapters that are merged into the base or disabled; and, when the module
            is called, a batch that does not fit or a place where rows cannot be told apart.

    Example::

        with lp.rows(model, ["legal", "medical", None]):
            logits = model(**batch_of_three)
    """
    if names is None:
        yield
        return
    if not isinstance(repeats, int) or repeats < 1:
        raise RowError(f"repeats is the number of entries for each name, at least 1, got {repeats!r}")
    found = stacks(model)
    wanted = _checked(model, names, found)
    spanning, root = _spanning(model, found, wanted)
    around = around_all(found)
    where = batch_layouts(model, [*found, *around, *([] if root is None else [root])])
    dispatcher = RowDispatcher(wanted, spanning, None if root is None else where[root])
    for stack in found.values():
        stack.ever_routed = {*(stack.ever_routed or ()), *(name for row in wanted for name in row)}
    with ExitStack() as leave:
        leave.callback(_keep, found, dispatcher, where)
        leave.enter_context(
            switched({s: {"dispatcher": dispatcher, "batch_layout": where[n]} for n, s in found.items()})
        )
        leave.callback(dispatcher.close)
        if root is not None:
            dispatcher.root_module = model.get_submodule(root)
            leave.enter_context(_split_at_root(dispatcher.root_module, next(iter(found.values()))))
        check = _LengthCheck(len(wanted), repeats)
        for name in around:
            module, enter = model.get_submodule(name), functools.partial(check.enter, where[name])
            leave.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            leave.callback(module.register_forward_hook(check.leave, always_call=True).remove)
        yield


def _keep(found: dict[str, AdapterStack], dispatcher: RowDispatcher, where: dict[str, BatchLayout]) -> None:
    # A dispatcher that is left stays: backward may run checkpointed forwards again.
    for name, stack in found.items():
        for switches in (stack.shared, current(stack)):
            if switches.dispatcher is None or not switches.dispatcher.open:
                switches.dispatcher, switches.batch_layout = dispatcher, where[name]


_LOCK = threading.Lock()


@contextmanager
def _split_at_root(module: nn.Module, stack: AdapterStack) -> Iterator[None]:
    """Within the context ``module`` is :class:`SplitAtRoot`; contexts of several threads may overlap."""
    with _LOCK:
        _, users = vars(module).get("_peft_split_at_root", (stack, 0))
        vars(module)["_peft_split_at_root"] = stack, users + 1
        add_mixin(module, SplitAtRoot)
    try:
        yield
    finally:
        with _LOCK:
            _, users = vars(module)["_peft_split_at_root"]
            vars(module)["_peft_split_at_root"] = stack, users - 1
            if users == 1:
                remove_mixin(module, SplitAtRoot)
                del vars(module)["_peft_split_at_root"]


class _LengthCheck:
    """Refuses a batch of another size than the names tell, at the outermost of some modules, before it computes."""

    def __init__(self, n: int, repeats: int) -> None:
        self.n, self.repeats = n, repeats
        self.this_thread = threading.local()  # the hooks see the calls of all threads
        self.this_thread.entered = True
        self.outermost: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"n": self.n, "repeats": self.repeats}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy of the model is not inside the context
        vars(self).update(state, this_thread=threading.local(), outermost=None)

    def enter(self, batch_layout: BatchLayout, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.outermost is not None or not getattr(self.this_thread, "entered", False):
            return
        self.outermost = module
        given = [t for t in tensors_in((*args, *kwargs.values())) if t.ndim]
        x = next((t for t in given if t.ndim > 1), given[0] if given else None)
        if x is None:
            return
        sizes = [x.shape[dim] for dim in batch_dims(batch_layout, x)]
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

    def leave(self, module: nn.Module, *_: Any) -> None:
        if self.outermost is module and getattr(self.this_thread, "entered", False):
            self.outermost = None


def _checked(model: nn.Module, names: Any, stacks: dict[str, AdapterStack]) -> Rows:
    if isinstance(names, str) or not isinstance(names, Sequence) or not len(names):
        raise RowError(f"names must be a list with one entry for each row of the batch, got {names!r}")
    known = list(dict.fromkeys(name for stack in stacks.values() for name in stack))
    record = injection_state(model)
    rows = []
    for i, entry in enumerate(names):
        row = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for name in row:
            if name in known:
                continue
            if record is not None and name in record.methods:
                raise RowError(
                    f"row {i}: {name!r} ({type(record.methods[name]).__name__}) trains parameters of the base itself, "
                    "which all rows share. Save it with lp.save_adapter and load it with lp.load_adapter: loaded, it "
                    "is a copy that rows can name"
                )
            near = nearest(str(name), known, n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise RowError(f"row {i}: no adapter named {name!r}{hint}; the model has {known}, and None is the base")
        if len(set(row)) < len(row):
            raise RowError(f"row {i} names an adapter twice: {row}")
        rows.append(row)
    for host, stack in stacks.items():
        if stack.merged is not None:
            raise RowError(f"{list(stack.merged_names)} are merged into {host!r}: lp.unmerge(model) first")
        if stack.disabled:
            raise RowError("all adapters are disabled here: lp.rows does nothing inside lp.disabled")
    return tuple(rows)


def _spanning(model: nn.Module, found: dict[str, AdapterStack], rows: Rows) -> tuple[frozenset[str], str | None]:
    """The adapters that span hosts where rows differ in them, and the name of the module around all these hosts."""
    where: dict[str, list[str]] = {}
    for host_name, stack in found.items():
        for name, adapter in stack.items():
            if cast(Adapter, adapter).spans_hosts:
                where.setdefault(name, []).append(host_name)
    spanning = frozenset(name for row in rows for name in row if name in where)
    inside = {host for name in spanning for host in where[name]}
    if len({spanning.intersection(row) for row in rows}) < 2 or len(inside) < 2:
        return frozenset(), None
    around = around_all(inside)
    while isinstance(model.get_submodule(around[-1]), nn.ModuleList | nn.ModuleDict):
        around.pop()  # these are never called
    return spanning, around[-1]
