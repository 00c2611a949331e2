"""One adapter, several or none for each row of a batch.

Low-rank updates of linear layers are computed for all rows together, by two batched products. Adapters that work on a
module's output are called once each, on their rows. Prefixes and prompts are padded and masked. For all others the
module they sit on, or the one around all of them, runs once for each group of rows with the same adapters.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.batch import Place, RowError, places, row_dim, tensors
from lightning_peft.core.host import AdapterStack, hosts
from lightning_peft.core.record import injection_of
from lightning_peft.core.router import Router, Rows, Spanned
from lightning_peft.core.swap import add_mixin, remove_mixin

__all__ = ["RowError", "rows"]


@contextmanager
def rows(model: nn.Module, names: Sequence[str | Sequence[str] | None] | None) -> Iterator[None]:
    """Within the context each row of a batch runs with the adapters it names, in training and in inference.

    The result is that of one pass for each row with only its adapters active, up to rounding. What is active otherwise
    makes no difference. A batch whose size is a multiple of the number of names holds several entries for each, one
    after the other, as in beam search.

    Args:
        model: an adapted model.
        names: for each row the name of an adapter, several names, or None for the base. None for all of them leaves the
            model as it is, so that ``batch.get("adapters")`` can be passed.

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
    found = dict(hosts(model))
    wanted = _checked(model, names, {name: cast(AdapterStack, host.adapters) for name, host in found.items()})
    spanning, root = _spanning(model, found, wanted)
    where = places(model, [*found, root] if root is not None else found)
    router = Router(wanted, spanning, None if root is None else where[root])
    with ExitStack() as leave:
        leave.callback(router.close)
        for name, host in found.items():
            stack = cast(AdapterStack, host.adapters)
            leave.callback(_restore, stack, stack.router, stack.place, router)
            stack.router, stack.place = router, where[name]
            stack.named = {*(stack.named or ()), *(name for row in wanted for name in row)}
        if root is not None:
            module = model.get_submodule(root)
            vars(module)["_peft_router"] = router
            leave.callback(vars(module).pop, "_peft_router")
            add_mixin(module, Spanned)
            leave.callback(remove_mixin, module, Spanned)
        check = _LengthCheck(Place("", type(model).__name__, "either"), len(wanted))
        leave.callback(model.register_forward_pre_hook(check, with_kwargs=True).remove)
        yield


def _restore(stack: AdapterStack, before: Any, place: Place | None, router: Router) -> None:
    # A router that is left stays: backward may run checkpointed forwards again.
    stack.router = before if before is not None and before.open else router
    stack.place = place if before is not None and before.open else stack.place


class _LengthCheck:
    """Refuses a batch that is no multiple of the rows before anything is computed."""

    def __init__(self, place: Place, n: int) -> None:
        self.place, self.n = place, n

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [t for t in tensors((*args, *kwargs.values())) if t.ndim]
        if given and not any(size % self.n == 0 for t in given for size in t.shape[:2]):
            row_dim(self.place, given[0], self.n)


def _checked(model: nn.Module, names: Any, stacks: dict[str, AdapterStack]) -> Rows:
    if isinstance(names, str) or not isinstance(names, Sequence) or not len(names):
        raise RowError(f"names must be a list with one entry for each row of the batch, got {names!r}")
    known = list(dict.fromkeys(name for stack in stacks.values() for name in stack))
    record = injection_of(model)
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
            near = difflib.get_close_matches(str(name), known, n=1)
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


def _spanning(model: nn.Module, found: dict[str, nn.Module], rows: Rows) -> tuple[frozenset[str], str | None]:
    """The adapters that span hosts where rows differ in them, and the name of the module around all these hosts."""
    where: dict[str, list[str]] = {}
    for host_name, host in found.items():
        for name, adapter in cast(AdapterStack, host.adapters).items():
            if cast(Adapter, adapter).spans_hosts:
                where.setdefault(name, []).append(host_name)
    spanning = frozenset(name for row in rows for name in row if name in where)
    inside = {host for name in spanning for host in where[name]}
    if len({spanning.intersection(row) for row in rows}) < 2 or len(inside) < 2:
        return frozenset(), None
    parts = [host.split(".") for host in inside]
    common = next(i for i in range(len(min(parts, key=len)) + 1) if len({tuple(p[: i + 1]) for p in parts}) > 1)
    while isinstance(model.get_submodule(".".join(parts[0][:common])), nn.ModuleList | nn.ModuleDict):
        common -= 1  # these are never called
    return spanning, ".".join(parts[0][:common])
