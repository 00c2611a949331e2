"""The report of :mod:`benchmarks.step`: summary table, plot, reasons for rows slower or larger than PEFT's, details."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread, paired_ratio
from benchmarks.methods import METHODS

Row = Mapping[str, Any]  # the runs of step.py by variant
Cases = Mapping[str, tuple[str, Mapping[str, Row]]]  # title and rows of each case


def time_over(row: Row, which: str, reference: str) -> Spread | None:
    """The ratio of two variants' step times for each repetition; None if one did not run."""
    if not (ran(row, which) and ran(row, reference)):
        return None
    return paired_ratio(row[which].times, row[reference].times)


def saved_over(row: Row, which: str, reference: str) -> float | None:
    """The ratio of what two variants save for backward; None if one did not run."""
    if not (ran(row, which) and ran(row, reference)):
        return None
    return row[which].saved.activations / row[reference].saved.activations


def ran(row: Row, which: str) -> bool:
    """Whether a variant was measured."""
    return which in row and not row[which].skipped


TOLERANCE = 0.02  # two runs of the same variant may differ by this much


def slower(row: Row) -> bool:
    """Whether our step takes longer than PEFT's, by more than the spread and the tolerance."""
    ratio = time_over(row, "ours", "peft")
    return ratio is not None and ratio.low > 1 and ratio.median > 1 + TOLERANCE


def larger(row: Row) -> bool:
    """Whether our forward saves more than PEFT's."""
    return (saved_over(row, "ours", "peft") or 0) > 1


def line_of(row: Row) -> str:
    """A row as one line, for the console."""
    parts = []
    for which in ("ours", "peft"):
        if ran(row, which):
            time, saved = time_over(row, which, "floor"), saved_over(row, which, "floor")
            assert time is not None
            parts.append(f"{which} {time.median:.3f} ({time.low:.2f}..{time.high:.2f}), saved {saved:.3f}")
        elif which in row:
            parts.append(f"{which} skipped: {row[which].skipped}")
    ratio = time_over(row, "ours", "peft")
    if ratio is not None:
        marks = " SLOWER" * slower(row) + " LARGER" * larger(row)
        parts.append(f"ours / peft {ratio.median:.3f}, saved {saved_over(row, 'ours', 'peft'):.3f}{marks}")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------------ tables


def markdown(about: Mapping[str, Any], cases: Cases, picture: str, faults: Callable[[str, Row], list[str]]) -> str:
    """The page for ``benchmarks/results``."""
    settings = about["settings"]
    precision = f"{settings['dtype']}{', bfloat16 autocast' if settings['autocast'] else ''}"
    clock = {"cpu": "The clock is the process's CPU time.", "wall": "The clock is wall time."}[settings["clock"]]
    lines = [
        "# Step time and saved activations of every method",
        "",
        f"Command: `python -m benchmarks.step {about['command']}`.",
        "",
        f"Hardware: {about['hardware']}.",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + ".",
        "",
        f"r = {settings['rank']}, {precision}, {settings['repeats']} repetitions. {clock} What the numbers mean:",
        "[`benchmarks/README.md`](../README.md).",
        "",
        "## At a glance",
        "",
        "Ratios to the floor (one step of the frozen base without an adapter), with PEFT's in brackets. **Bold**",
        f"if ours is larger, or slower by more than {TOLERANCE:.0%}; the reasons are below.",
        "",
        *_glance(cases),
        "",
        f"![Ratios to the floor]({picture})",
        "",
        *_reasons(cases),
        "## The rows",
        "",
        *(f"- {name}: {METHODS[name].what}." for name in _methods(cases)),
    ]
    for title, rows in cases.values():
        lines += ["", f"## {title}", "", *_details(rows), ""]
        lines += [f"- not comparable: {name}: {fault}" for name, row in rows.items() for fault in faults(name, row)]
        missing = {name: row["peft"].skipped for name, row in rows.items() if "peft" in row and row["peft"].skipped}
        lines += [f"- {name}: PEFT's {reason}" for name, reason in missing.items()]
    return "\n".join(lines).rstrip() + "\n"


def _methods(cases: Cases) -> list[str]:
    return [name for name in METHODS if any(name in rows for _, rows in cases.values())]


def _glance(cases: Cases) -> list[str]:
    shown = list(cases)
    head = ["method", *(f"{case}: {what}" for case in shown for what in ("step", "saved"))]
    lines = _table(head)
    for name in _methods(cases):
        cells = [name]
        for case in shown:
            row = cases[case][1].get(name)
            cells += _cells(row) if row else ["", ""]
        lines.append(_line(cells))
    return lines


def _cells(row: Row) -> list[str]:
    def cell(mine: float, theirs: float | None, bold: bool) -> str:
        text = f"{mine:.2f}" + (f" ({theirs:.2f})" if theirs is not None else "")
        return f"**{text}**" if bold else text

    times = {which: time_over(row, which, "floor") for which in ("ours", "peft")}
    medians = {which: t.median if t else None for which, t in times.items()}
    saved = {which: saved_over(row, which, "floor") for which in ("ours", "peft")}
    mine, kept = medians["ours"], saved["ours"]
    assert mine is not None
    assert kept is not None
    return [cell(mine, medians["peft"], slower(row)), cell(kept, saved["peft"], larger(row))]


def _reasons(cases: Cases) -> list[str]:
    """List the rows that are slower or larger than PEFT's, each with the reason in its method."""
    found = []
    for name in _methods(cases):
        rows = {case: rows[name] for case, (_, rows) in cases.items() if name in rows}
        for what, dearer in (("time", slower), ("saved", larger)):
            where = [case for case, row in rows.items() if dearer(row)]
            if where:
                word = {"time": "slower", "saved": "larger"}[what]
                reason = METHODS[name].why.get(what, "no reason known.")
                found.append(f"- {name}, {word} on {', '.join(where)}: {reason}")
    if not found:
        return ["No row is slower or larger than PEFT's.", ""]
    return ["## Slower or larger than PEFT", "", *found, ""]


DETAILS = [
    "method",
    "trainable",
    "step ms",
    "step / floor",
    "PEFT / floor",
    "step / PEFT",
    "saved MB",
    "saved / floor",
    "PEFT / floor",
    "saved / PEFT",
    "peak MB",
]


def _details(rows: Mapping[str, Row]) -> list[str]:
    peak = any(run.peak is not None for row in rows.values() for run in row.values())
    head = DETAILS if peak else DETAILS[:-1]
    floors = [next(iter(rows.values()))["floor"]]
    lines = _table(head)
    lines.append(_line(["floor", "0", f"{1e3 * Spread.of(floors[0].times).median:.1f}", *[""] * (len(head) - 3)]))
    for name, row in rows.items():
        mine = row["ours"]
        cells = [name, f"{mine.trainable:,}", f"{1e3 * Spread.of(mine.times).median:.1f}"]
        cells += [_spread(time_over(row, *pair)) for pair in (("ours", "floor"), ("peft", "floor"), ("ours", "peft"))]
        cells.append(f"{mine.saved.activations / 1e6:.2f}")
        ratios = [saved_over(row, *pair) for pair in (("ours", "floor"), ("peft", "floor"), ("ours", "peft"))]
        cells += [f"{ratio:.3f}" if ratio is not None else "" for ratio in ratios]
        lines.append(_line(cells + ([f"{mine.peak / 1e6:.1f}"] if peak else [])))
    return lines


def _spread(ratio: Spread | None) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.2f}..{ratio.high:.2f})" if ratio else ""


def _table(head: list[str]) -> list[str]:
    return [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -------------------------------------------------------------------------------------------------- plot


def plot(cases: Cases, path: Path) -> None:
    """Plot the ratios of step time and saved activations, ours and PEFT's; without matplotlib, do nothing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = {case: rows for case, (_, rows) in cases.items() if rows}
    widths = [len(rows) + 2 for rows in shown.values()]
    figure = Figure(figsize=(0.22 * sum(widths) + 1.5, 6), layout="constrained")
    grid = figure.subplots(2, len(shown), sharey="row", sharex="col", squeeze=False, width_ratios=widths)
    for column, (case, rows) in enumerate(shown.items()):
        names = [name for name in METHODS if name in rows]
        for axes, what in ((grid[0][column], "step time"), (grid[1][column], "saved activations")):
            for which, color, marker in (("peft", "tab:orange", "o"), ("ours", "tab:blue", "_")):
                values = {i: _value(rows[name], which, what) for i, name in enumerate(names)}
                known = {i: value for i, value in values.items() if value is not None}
                size = 9 if marker == "_" else 5
                axes.plot(list(known), list(known.values()), marker, color=color, ms=size, mew=2, label=which)
            axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
            axes.grid(axis="y", alpha=0.3)
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_xlim(-1, len(names))
        grid[0][column].set_title(case)
    grid[0][0].set_ylabel("step time / floor")
    grid[1][0].set_ylabel("saved activations / floor")
    grid[0][0].legend()
    figure.savefig(path, dpi=110)


def _value(row: Row, which: str, what: str) -> float | None:
    if what == "saved activations":
        return saved_over(row, which, "floor")
    ratio = time_over(row, which, "floor")
    return ratio.median if ratio else None
