"""Report what a method did, or would do, to a model: counts, and a table that groups repeated layers."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_peft.core.names import listed, numbers_as_stars
from lightning_peft.core.targeting.base_modules import base_parameters
from lightning_peft.core.targeting.packed import count_parameters

__all__ = ["Entry", "Report"]


class Entry(NamedTuple):
    """One action of one method: the module, a description, and the number of trainable parameters."""

    module: str
    what: str
    parameters: int
    adapter: str


@dataclass
class Report:
    """The match table of one or more methods on one model.

    Attributes:
        trainable: the number of parameters that train.
        total: the number of all parameters, including adapters.
        entries: the actions, in order.
        notes: sentences about what was skipped and why.
        in_eval_mode: the frozen modules that stay in eval mode during the fit.

    Example::

        report = lp.inspect(model, lp.LoRA(r=8, targets=["q_proj"]))
        print(f"{report.trainable} of {report.total} parameters would train")
        print(report)  # the table
    """

    trainable: int = 0
    total: int = 0
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    in_eval_mode: list[str] = field(default_factory=list)

    @property
    def modules(self) -> dict[str, str]:
        """Maps qualified names to descriptions of what was done there."""
        found: dict[str, str] = {}
        for entry in self.entries:
            found[entry.module] = f"{found[entry.module]} + {entry.what}" if entry.module in found else entry.what
        return found

    @property
    def parameters(self) -> dict[str, int]:
        """Maps the same names to numbers of trainable parameters."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.module] = found.get(entry.module, 0) + entry.parameters
        return found

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def add(self, name: str, what: str, parameters: int, adapter: str) -> None:
        """Add an entry: the method called ``adapter`` did ``what`` to the module or weight ``name``."""
        self.entries.append(Entry(name, what, parameters, adapter))

    def note(self, notes: Iterable[str]) -> None:
        """Add notes, without duplicates."""
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def count(self, model: nn.Module, adapters: Iterable[tuple[int, int]] = ()) -> None:
        """Recount the parameters: those of the base, and of ``adapters``, given as pairs (trainable, total)."""
        base = sum(p.numel() for _, p in base_parameters(model) if p.requires_grad), count_parameters(model)
        self.trainable, self.total = (sum(column) for column in zip(base, *adapters))

    def copy(self) -> Report:
        """Return an independent copy."""
        return replace(self, entries=[*self.entries], notes=[*self.notes])

    def rows(self) -> list[tuple[str, int, str, int]]:
        """Return the rows of the table: name (``*`` for a layer's number), modules, description, parameters."""
        grouped: dict[tuple[str, str], list[str]] = {}
        counts = self.parameters
        for name, what in self.modules.items():
            grouped.setdefault((numbers_as_stars(name), what), []).append(name)
        return [
            (kind if len(names) > 1 else names[0], len(names), what, sum(counts[n] for n in names))
            for (kind, what), names in grouped.items()
        ]

    def __rich__(self) -> Table:
        table = Table(title="What is adapted, and what trains", title_justify="left")
        table.add_column("module", overflow="fold")
        table.add_column("modules", justify="right")
        table.add_column("what")
        table.add_column("trainable", justify="right")
        for name, count, what, parameters in self.rows():
            table.add_row(name or "(the model)", str(count), what, f"{parameters:,}")
        table.add_section()
        table.add_row("all", str(len(self.modules)), self.summary(), f"{self.trainable:,}")
        table.caption = "\n".join([*self.notes, *self._mode_note()]) or None
        table.caption_justify = "left"
        return table

    def _mode_note(self) -> list[str]:
        if not self.in_eval_mode:
            return []
        which = listed(name or "the model" for name in self.in_eval_mode)
        return [
            f"The frozen base stays in eval mode, without its own dropout: {which}; call train() before fit to "
            f"change that"
        ]

    def summary(self) -> str:
        """Return one line: trainable parameters, total parameters and the percentage."""
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.3g} %)"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()
