"""The table of docs/strategies.md: methods under Lightning's strategies and precisions, compiled and checkpointed.

``python -m tests.lists`` writes it. ``test_sharded_methods.py``, ``test_precisions.py`` and ``test_compile_fits.py`` in
``tests/trainer`` test every cell on the CPU; gradient checkpointing is tested over ``tests/table.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision

from benchmarks.faults import kind_of
from tests.kinds import KINDS
from tests.table import METHODS, hole

__all__ = ["PRECISIONS", "REMARKS", "ROWS", "STRATEGIES", "WARNED", "precision", "table", "trained_dtype"]


def _rows() -> dict[str, str]:
    """The first row of ``tests/table.py`` for the class of each method."""
    found: dict[str, str] = {}
    for name, row in METHODS.items():
        method = type(row.make(KINDS[kind_of(name)]))
        if method.__module__.startswith("lightning_peft."):
            found.setdefault(method.__name__, name)
    return found


ROWS = _rows()

STRATEGIES = {
    "DDP": "`DDPStrategy`, without `find_unused_parameters`",
    "FSDP2": "`ModelParallelStrategy(data_parallel_size=2)`; the module calls `lp.apply(self)`, then `fully_shard`",
    "FSDP1": "`FSDPStrategy`; frozen parameters are sharded, trained ones stay whole",
    "tensor parallel": "`ModelParallelStrategy(1, 2)`; the module calls `parallelize_module`, then nothing or "
    "`lp.apply(self)`; every linear layer is split, by columns or by rows",
}

MEMORY = {
    "compile": "`torch.compile(fullgraph=True)` of the network: one graph for training and one for validation",
    "checkpointing": "`torch.utils.checkpoint` with either value of `use_reentrant` gives equal gradients",
}

PRECISIONS = {
    "32-true": torch.float32,
    "16-mixed": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.float32,
    "16-true": torch.float32,
    "64-true": torch.float64,
}


def precision(name: str) -> dict[str, Any]:
    """The Trainer's arguments for a precision; on the CPU, Lightning would replace 16-mixed by bf16-mixed."""
    if name == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}
    return {"precision": name}


_BASE = "it trains parameters of the base in the base's dtype, and warns; bf16-mixed keeps them in float32"

_AGAIN = "recompiled whenever more parameters start to train"

#: (method, column) -> a remark on a cell that works; what trains under a precision is then in the precision's own dtype
REMARKS = {(method, "bf16-true"): _BASE for method in ("FullFineTuning", "BitFit")}
REMARKS[("GradualUnfreezing", "compile")] = _AGAIN

_FLOAT16 = "it would train the base's float16 parameters, where AdamW's eps of 1e-8 is zero; a warning says so"
#: (method, column) -> why the combination does not work; a warning says what to do, because other optimizers may work
WARNED = {(method, "16-true"): _FLOAT16 for method in ("FullFineTuning", "BitFit")}


def trained_dtype(method: str, name: str) -> torch.dtype:
    """The dtype of what a method trains under a precision."""
    return torch.bfloat16 if (method, name) in REMARKS else PRECISIONS[name]


def table() -> str:
    """The table of the page, with its footnotes."""
    columns = [*STRATEGIES, *PRECISIONS, "compile", "checkpointing"]
    remarks = list(dict.fromkeys([*REMARKS.values(), *WARNED.values()]))

    def cell(method: str, column: str) -> str:
        if column == "checkpointing":
            held = hole(ROWS[method], kind_of(ROWS[method]), "checkpointing") is None
            return "yes" if held else "not tested"
        if (method, column) in WARNED:
            return f"no [{remarks.index(WARNED[method, column]) + 1}]"
        remark = REMARKS.get((method, column))
        return "yes" if remark is None else f"yes [{remarks.index(remark) + 1}]"

    return "\n".join(
        [
            f"| | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
            *(f"| `{method}` | {' | '.join(cell(method, column) for column in columns)} |" for method in ROWS),
            "",
            *(f"- **{name}**: {meaning}." for name, meaning in [*STRATEGIES.items(), *MEMORY.items()]),
            "",
            *(f"{i}. {remark}" for i, remark in enumerate(remarks, 1)),
        ]
    )
