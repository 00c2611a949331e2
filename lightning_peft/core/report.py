"""What a method did, or would do, to a model: counts, and a table that groups repeated layers."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

__all__ = ["Report"]


@dataclass
class Report:
    """The match table of one or more methods on one model.

    Attributes:
        trainable: the number of parameters that train.
        total: the number of all parameters, the adapters' included.
        modules: what was done where: qualified name to description.
        parameters: the number of trainable parameters there.
        notes: what was left alone and why.
    """

    trainable: int = 0
    total: int = 0
    modules: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def add(self, name: str, what: str, parameters: int) -> None:
        """Note that ``what`` was done at ``name``, with so many trainable parameters."""
        self.modules[name] = f"{self.modules[name]} + {what}" if name in self.modules else what
        self.parameters[name] = self.parameters.get(name, 0) + parameters

    def rows(self) -> list[tuple[str, int, str, int]]:
        """The table's rows: name (``*`` for a layer's number), how many such modules, what, parameters in all."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for name, what in self.modules.items():
            grouped.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), what), []).append(name)
        return [
            (kind if len(names) > 1 else names[0], len(names), what, sum(self.parameters[n] for n in names))
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
        table.caption = "\n".join(self.notes) or None
        table.caption_justify = "left"
        return table

    def summary(self) -> str:
        """One line: trainable of total, and percent."""
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.3g} %)"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()
