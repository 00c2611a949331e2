"""The table of docs/quantised.md: every method on every kind of quantised base, and how it merges.

``python -m tests.lists`` writes the table; ``tests/integration/packages/test_packed_methods.py`` tests every cell.
"""

from __future__ import annotations

from collections.abc import Mapping

import lightning_peft as lp
from tests.features import HOLES, ROWS, Row

#: the arguments of ``QuantizeBase`` by column; a column without any holds layers that packages quantise when they load
KINDS: Mapping[str, Mapping[str, object] | None] = {
    "bitsandbytes nf4": {"kind": "nf4"},
    "bitsandbytes int8": {"kind": "int8"},
    "torchao int8": {"kind": "int8", "backend": "torchao"},
    "torchao int4": {"kind": "int4", "options": {"group_size": 8}},
    "torchao float8": {"kind": "float8"},
    "GPTQ": None,
    "quanto": None,
}

#: the first row of docs/support.md for each method, and LoRA's options that concern the stored weight and bias
METHODS: dict[str, Row] = {
    name: row
    for name, row in ROWS.items()
    if name in ('LoRA(init="pissa")', 'LoRA(init="olora")', 'LoRA(bias="all")')
    or name == next(other for other, found in ROWS.items() if found.method is row.method)
}

#: the error for methods that would train quantised weights
_TRAIN = "cannot train because .* quantised"
_REFUSED = {lp.FullFineTuning: _TRAIN, lp.LastLayers: _TRAIN, lp.GradualUnfreezing: _TRAIN}


def refused(name: str, kind: str) -> str | None:
    """A part of the error for a method on a kind of base that it refuses; None if it works."""
    method = METHODS[name].method
    if kind == "GPTQ" and (method is lp.BitFit or "bias" in name):
        return "store (theirs|them) as buffers, which cannot train"
    return _REFUSED.get(method)  # type: ignore[call-overload]


def merges(name: str) -> bool | None:
    """Whether a method merges with ``dequantize=True``; None if it trains parameters of the base itself."""
    if issubclass(METHODS[name].method, lp.SelectionMethod):  # type: ignore[arg-type]
        return None
    return (name, "merge") not in HOLES


def table() -> str:
    """The table of the page."""
    lines = [f"| | {' | '.join(KINDS)} | merge |", f"|---|{'---|' * len(KINDS)}---|"]
    for name in METHODS:
        cells = ["yes" if refused(name, kind) is None else "refused" for kind in KINDS]
        merge = {True: "`dequantize=True`", False: "no", None: "nothing to merge"}[merges(name)]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {merge if 'yes' in cells else ''} |")
    return "\n".join(lines)
