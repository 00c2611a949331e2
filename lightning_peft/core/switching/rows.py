"""Use different adapters (one, several or none) for each row of a batch.

Low-rank updates of linear layers are computed for all rows together with two batched products. Adapters that modify a
module's output are called once each, on their rows. Prefixes and prompts are padded and masked. For all other adapters,
their host, or the module around all their hosts, runs once for each group of rows with the same adapters.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import adapter_names, stacks
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.adapters.switches import current, switched
from lightning_peft.core.batching.layout import BatchLayout, RowError, batch_layouts
from lightning_peft.core.class_swap import add_mixin
from lightning_peft.core.names import around_all, nearest
from lightning_peft.core.record import injection_state
from lightning_peft.core.switching.row_dispatcher import AroundHosts, RowDispatcher, Rows

__all__ = ["rows"]


@contextmanager
def rows(model: nn.Module, names: Sequence[str | Sequence[str] | None] | None, repeats: int = 1) -> Iterator[None]:
    """Inside the context, each row of a batch runs with its own adapters, in training and in inference.

    The context applies to the thread or task that entered it. Up to rounding, the result equals running each row alone
    with only its adapters active. Adapters activated with :func:`lightning_peft.set_active` are ignored.

    The outermost module that is called around all adapters must get one entry per name, or ``repeats`` entries. Modules
    inside it may see more entries per row (windows, flattened tokens), in row order.

    Args:
        model: an adapted model.
        names: for each row, the name of an adapter, several names, or None for the base. If the whole argument is None,
            the context has no effect, so ``batch.get("adapters")`` can be passed.
        repeats: the number of consecutive entries of the batch per name: in ``generate``, the larger of ``num_beams``
            and ``num_return_sequences``.

    Raises:
        RowError: if a name is unknown, or adapters are merged into the base or disabled. The model's forward raises it
            if the batch does not fit the names, or the rows cannot be found in some module.

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
    if root is not None and root not in around:
        around.append(root)
    where = batch_layouts(model, [*found, *around])
    dispatcher = RowDispatcher(wanted, repeats, spanning, None if root is None else where[root])
    for name in around:
        _add_around_hosts(module := model.get_submodule(name), next(iter(found.values())))
        dispatcher.around[module] = where[name]
    for stack in found.values():
        stack.ever_routed = set() if stack.ever_routed is None else stack.ever_routed
        stack.ever_routed.update(name for row in wanted for name in row)
    # Exits run in reverse order: close the dispatcher, restore the switches, then keep the dispatcher for backward.
    with ExitStack() as leave:
        leave.callback(_keep, found, dispatcher, where)
        leave.enter_context(
            switched({s: {"dispatcher": dispatcher, "batch_layout": where[n]} for n, s in found.items()})
        )
        leave.callback(dispatcher.close)
        yield


def _keep(found: dict[str, AdapterStack], dispatcher: RowDispatcher, where: dict[str, BatchLayout]) -> None:
    # Keep the dispatcher after the context exits, because backward may repeat checkpointed forwards with its rows.
    for name, stack in found.items():
        for switches in (stack.shared, current(stack)):
            if switches.dispatcher is None or not switches.dispatcher.open:
                switches.dispatcher, switches.batch_layout = dispatcher, where[name]


_LOCK = threading.Lock()


def _add_around_hosts(module: nn.Module, stack: AdapterStack) -> None:
    """Add :class:`AroundHosts` to ``module``, until :func:`lightning_peft.unload` restores its class."""
    with _LOCK:
        vars(module)["_peft_rows_stack"] = stack
        add_mixin(module, AroundHosts)


def _checked(model: nn.Module, names: Any, stacks: dict[str, AdapterStack]) -> Rows:
    if isinstance(names, str) or not isinstance(names, Sequence) or not len(names):
        raise RowError(f"names must be a list with one entry for each row of the batch, got {names!r}")
    known = {name for name in _named(names) if any(name in stack._modules for stack in stacks.values())}
    record = injection_state(model)
    rows = []
    for i, entry in enumerate(names):
        row = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for name in row:
            if name in known:
                continue
            if record is not None and name in record.methods:
                raise RowError(
                    f"row {i}: {name!r} ({type(record.methods[name]).__name__}) trains parameters of the base, "
                    "which all rows share. Save it with lp.save_adapter and load it with lp.load_adapter: its loaded "
                    "copy can be used by row"
                )
            there = list(adapter_names(model))
            near = nearest(str(name), there, n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise RowError(f"row {i}: no adapter named {name!r}{hint}; the model has {there}, and None is the base")
        if len(set(row)) < len(row):
            raise RowError(f"row {i} names an adapter twice: {row}")
        rows.append(row)
    for host, stack in stacks.items():
        if stack.merged is not None:
            raise RowError(f"{list(stack.merged_names)} are merged into {host!r}: call lp.unmerge(model) first")
        if stack.disabled:
            raise RowError("all adapters are disabled here: lp.rows does nothing inside lp.disabled")
    return tuple(rows)


def _named(names: Sequence[Any]) -> set[Any]:
    """Return every name in ``names``, whose entries are names, sequences of names, or None."""
    return {name for entry in names if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)}


def _spanning(model: nn.Module, found: dict[str, AdapterStack], rows: Rows) -> tuple[frozenset[str], str | None]:
    """Return the adapters that span hosts, if rows differ in them, and the name of the module around these hosts."""
    where: dict[str, list[str]] = {}
    used = {name for row in rows for name in row}
    for host_name, stack in found.items():
        for name in used:
            if name in stack._modules and cast(Adapter, stack._modules[name]).spans_hosts:
                where.setdefault(name, []).append(host_name)
    spanning = frozenset(name for row in rows for name in row if name in where)
    inside = {host for name in spanning for host in where[name]}
    if len({spanning.intersection(row) for row in rows}) < 2 or len(inside) < 2:
        return frozenset(), None
    around = around_all(inside)
    while isinstance(model.get_submodule(around[-1]), nn.ModuleList | nn.ModuleDict):
        around.pop()  # a container is never called
    return spanning, around[-1]
