"""Change the base before methods are planned, as :class:`lightning_peft.QuantizeBase` does.

A preparation runs once, at the moment of injection, when the base has its weights but no adapters yet. The model
records it, so that checkpoints state which base they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from torch import nn

from lightning_peft.core.injection.rollback import all_or_nothing
from lightning_peft.core.record import injection_state, preparations

__all__ = ["Preparation", "is_preparation", "not_yet_prepared", "prepared"]


class Preparation(Protocol):
    """The interface of an object that changes the base before :func:`apply` plans the methods."""

    def config(self) -> dict[str, Any]: ...

    def prepare(self, model: nn.Module, preview: bool = False) -> str:
        """Change ``model`` in place, and return a sentence for the report; with ``preview``, change nothing."""
        ...


def is_preparation(candidate: object) -> bool:
    """Whether ``candidate`` changes the base instead of adding parameters to it."""
    return hasattr(candidate, "prepare") and hasattr(candidate, "config") and not hasattr(candidate, "plan")


def not_yet_prepared(model: nn.Module, wanted: Iterable[Preparation]) -> list[Preparation]:
    """Return the preparations in ``wanted`` that were not applied to ``model`` yet.

    Raises:
        ValueError: if methods were already applied to ``model``, or the base was prepared differently.
    """
    wanted, new = list(wanted), []
    there = preparations(model) if wanted else []  # it looks at every module, adapters included
    for step in wanted:
        kind = type(step).__name__
        if _entry(step) in there:
            continue
        if any(entry["method"] == kind for entry in there):
            raise ValueError(f"the base was already prepared by a {kind} with other arguments: use the same ones")
        if injection_state(model) is not None:
            raise ValueError(
                f"{kind} changes the base, but methods were already applied to it: pass it to the first lp.apply, or "
                "call lp.unload(model) first"
            )
        new.append(step)
    return new


@contextmanager
def prepared(model: nn.Module, steps: Sequence[Preparation]) -> Iterator[list[str]]:
    """Run ``steps``, yield their sentences for the report, and undo everything if the context ends in an exception."""
    with all_or_nothing(model) if steps else nullcontext():
        notes = [step.prepare(model) for step in steps]
        if steps:
            own = vars(model)
            own["_peft_prepared"] = [*own.get("_peft_prepared", ()), *map(_entry, steps)]
        yield notes


def _entry(step: Preparation) -> dict[str, Any]:
    return {"method": type(step).__name__, "config": step.config()}
