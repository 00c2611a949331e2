"""Check that the adapters take part in a batch: their modules are called, and no code bypasses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch import nn

from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.raw_reads import RawReads
from lightning_peft.core.adapters.reads import computing
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.class_swap import add_mixin, remove_mixin
from lightning_peft.core.names import join, listed
from lightning_peft.trainer.audit import report

__all__ = ["CallAudit", "audit"]


class CallAudit:
    """Records which adapted modules are called, and which have their weights read, while one batch runs.

    Code that reads a weight gets the adapted one, so weight adapters work either way. An adapter on activations works
    only if its module is called. If the module's weight is read but the module is not called, a parent computes with
    the weight directly and bypasses the adapter. A module with neither is not used by this batch.

    Code that gets the stored weight without reading the attribute bypasses weight adapters too; :class:`RawReads` finds
    it.

    This swaps classes instead of registering hooks, because some modules (nn.TransformerEncoderLayer, for example)
    take another code path if hooks are present.

    Args:
        model: the module that trains.
        operations: whether to watch operations, to find code that gets the stored weight.
    """

    def __init__(self, model: nn.Module, operations: bool = True) -> None:
        self.model = model
        # An adapter without parameters only supports another adapter, whose module is watched itself.
        found = [(name, host, cast(AdapterStack, host.adapters)) for name, host in hosts(model)]
        self.watched = {n: h for n, h, stack in found if stack.active and any(True for _ in stack.parameters())}
        for host in self.watched.values():
            host.__dict__["_peft_seen"] = set()
            add_mixin(host, _Watched)
        self.raw_reads = RawReads(model, self.watched)
        self._operations = ExitStack()  # not a with statement, because the batch runs in the Trainer
        if operations:
            self._operations.enter_context(self.raw_reads)

    def end_forward(self) -> None:
        """Stop watching operations: those of a backward pass and of an optimizer are not user code."""
        self._operations.close()

    def finish(self) -> tuple[set[str], list[str]]:
        """Stop watching. Returns the names of the modules that were called, and of those that were bypassed."""
        self.end_forward()
        called, bypassed = set(), []
        for name, host in self.watched.items():
            remove_mixin(host, _Watched)
            seen = host.__dict__.pop("_peft_seen")
            if "called" in seen:
                called.add(name)
            elif seen and any(not a.changes() for a in cast(AdapterStack, host.adapters).running()):
                bypassed.append(name)
        self.watched = {}
        return called, bypassed

    def report(self, where: str) -> set[str]:
        """Stop watching and report bypassed adapters. Returns the names of the modules that were called."""
        called, bypassed = self.finish()
        if bypassed:
            report(
                self.model,
                f"the adapters of {listed(bypassed)} did not run in {where}: a parent module reads the weights of "
                "these modules without calling them, so their activations cannot be adapted. Exclude them, adapt the "
                "parent module, or use a method that changes weights, such as lp.LoRA",
            )
        for read, (function, place) in self.raw_reads.found.items():
            report(
                self.model,
                f"the adapters of {read.host_name!r} have no effect in {place}: it calls {function} with the stored "
                f"{join(read.host_name, read.name)!r}, which it got from parameters(), _parameters or a list made "
                "earlier, so merging would change the output. Read the weight as an attribute of its module where it "
                "is used, or exclude the module from targets",
            )
        return called


@contextmanager
def audit(model: nn.Module) -> Iterator[None]:
    """Check that the adapters take part in the batch that runs in the block, as a Trainer does in its first batch.

    Use it in a loop without a Trainer. It makes the batch slower. A compiled module is not checked.

    Raises:
        AuditError: if code computes with the weight of an adapted module in a way that bypasses its adapter.

    Example::

        with lp.audit(model):
            loss = model(**next(iter(loader))).loss
    """
    calls = CallAudit(model)
    try:
        yield
    except BaseException:
        calls.finish()
        raise
    calls.report("the audited block")


class _Watched(nn.Module):
    """Mixin for a module that a :class:`CallAudit` watches."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["_peft_seen"].add("called")
        return super().forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_parameters"] and computing():
            self.__dict__["_peft_seen"].add(name)
        return super().__getattr__(name)
