"""Keep ``lp.rows`` entered between batches with the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn

from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.switching.rows import rows

__all__ = ["RowsContext"]


class RowsContext:
    """Keeps one ``lp.rows`` context open while the rows stay the same, because entering it takes time.

    Args:
        model: the module that holds the adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: list[str | None] | None = None
        self._stack = ExitStack()

    def enter(self, names: Sequence[str | None]) -> None:
        """Use the adapters ``names`` for the rows of the next batches."""
        if self._names == list(names):
            return
        self.close()
        if stacks(self._model):
            self._stack.enter_context(rows(self._model, list(names)))
        self._names = list(names)

    def close(self) -> None:
        """Exit the context; call this before adapters are loaded or deleted."""
        self._stack.close()
        self._names = None
