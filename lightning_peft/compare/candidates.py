"""The candidates of a comparison: methods with fixed arguments and search ranges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import yaml
from torch import nn

import lightning_peft as lp
from lightning_peft.core.names import nearest
from lightning_peft.pretrained import InputError

__all__ = ["Candidate", "Choices", "Range", "fitting", "parse_candidates"]

#: learning rates from which a search starts; those of the studies in docs/results
START = {
    "BitFit": 3e-3,
    "FullFineTuning": 3e-4,
    "GradualUnfreezing": 3e-4,
    "HiRA": 1e-2,
    "IA3": 3e-2,
    "LastLayers": 1e-3,
    "LinearProbe": 3e-2,
    "LoKr": 1e-2,
    "NormTuning": 1e-2,
    "PTuning": 3e-3,
    "PrefixTuning": 3e-2,
    "PromptTuning": 3e-2,
    "SSF": 1e-2,
    "VeRA": 1e-2,
    "VisualPromptTuning": 1e-2,
}
_OTHER_START = 3e-3
_RANKS = (4, 8, 16)

#: one method of each family, in order of preference: the first that fits the model is compared
AUTO = {
    "weight": ("LoRA",),
    "activation": ("BottleneckAdapter", "IA3"),
    "sequence": ("PrefixTuning", "VisualPromptTuning", "PromptTuning"),
    "selection": ("BitFit", "NormTuning", "LastLayers"),
    "everything": ("FullFineTuning",),
}


@attrs.frozen
class Range:
    """Numbers from ``low`` to ``high``; with ``log`` their logarithms are uniform."""

    low: float
    high: float
    log: bool = False


@attrs.frozen
class Choices:
    """A list of values."""

    values: tuple[Any, ...]


@attrs.frozen
class Candidate:
    """One entry of a comparison.

    Attributes:
        label: its name in the results, unique.
        method: the name of the class in ``lightning_peft``.
        arguments: fixed arguments of the class.
        ranges: arguments that are searched.
        rate: the learning rate: a number, a range, or None to search around the method's usual rate.
    """

    label: str
    method: str
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    ranges: Mapping[str, Range | Choices] = attrs.field(factory=dict)
    rate: float | Range | None = None

    @property
    def key(self) -> str:
        """Identifies the candidate's runs on disk: the label, and a digest of everything else."""
        text = json.dumps(attrs.asdict(self), sort_keys=True, default=str)
        plain = "".join(c if c.isalnum() else "-" for c in self.label)
        return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def start(self) -> float:
        """The learning rate that is tried first."""
        if isinstance(self.rate, Range):
            middle = (self.rate.low * self.rate.high) ** 0.5
            usual = START.get(self.method, _OTHER_START)
            return usual if self.rate.low <= usual <= self.rate.high else middle
        return START.get(self.method, _OTHER_START) if self.rate is None else self.rate

    @property
    def rates(self) -> Range:
        """The learning rates that may be tried."""
        if isinstance(self.rate, Range):
            return self.rate
        return Range(self.start / 100, self.start * 100, log=True) if self.rate is None else Range(self.rate, self.rate)

    @property
    def searched(self) -> bool:
        """Whether anything is searched."""
        return bool(self.ranges) or not isinstance(self.rate, int | float)

    def flags(self, values: Mapping[str, Any]) -> list[str]:
        """The command-line arguments of ``lightning-peft fit`` that add the method with ``values`` for the ranges."""
        given = {**self.arguments, **{name: value for name, value in values.items() if name in self.ranges}}
        shown = {n: value if isinstance(value, str) else json.dumps(value) for n, value in given.items()}
        return [f"--method={self.method}", *(f"--method.{n}={v}" for n, v in shown.items())]


def parse_candidates(
    methods: str, common: Mapping[str, Any] | None = None, fixed_rank: bool = False
) -> tuple[list[Candidate], bool]:
    """Read ``--methods``.

    Args:
        methods: names of methods, separated by commas; ``"auto"``, ``"all"``; or the path of a YAML file.
        common: arguments for every method that has them, such as ``{"trainable": ["head"]}``.
        fixed_rank: do not search the rank of methods that have one.

    Returns:
        The candidates, and whether the user named them: named methods that do not fit the model are failures, those of
        ``auto`` and ``all`` are left out.

    Raises:
        InputError: if a method, an argument or a range is not valid.
    """
    known = _known()
    common = dict(common or {})
    if methods.strip() in ("auto", "all"):
        names = known if methods.strip() == "all" else [name for names in AUTO.values() for name in names]
        return [_candidate(name, {"method": name}, common, known, fixed_rank) for name in names], False
    if Path(methods).suffix in (".yaml", ".yml"):
        table = _read(Path(methods))
        common |= table.get("common") or {}
        entries = {label: dict(entry or {}) for label, entry in table["methods"].items()}
        return [_candidate(label, entry, common, known, True) for label, entry in entries.items()], True
    labels = [name.strip() for name in methods.split(",") if name.strip()]
    if not labels or len(set(labels)) != len(labels):
        raise InputError(f"--methods {methods}: give different names separated by commas, 'auto', or a YAML file")
    return [_candidate(label, {}, common, known, fixed_rank) for label in labels], True


def fitting(candidates: Iterable[Candidate], model: nn.Module, one_of_each: bool) -> dict[str, int]:
    """Return the labels of the candidates that can be applied to ``model``, and how many parameters each would train.

    Args:
        model: not changed.
        one_of_each: keep only the first candidate of each family that fits.
    """
    fits, labels = {}, {}
    for candidate in candidates:
        try:
            found = lp.inspect(model, getattr(lp, candidate.method)(**candidate.arguments))
        except (ValueError, TypeError, RuntimeError):
            continue
        fits[candidate.label], labels[candidate.method] = found.trainable, candidate.label
    if not one_of_each:
        return fits
    firsts = (next((labels[name] for name in names if name in labels), None) for names in AUTO.values())
    return {label: fits[label] for label in firsts if label is not None}


def _known() -> dict[str, type[lp.PEFTMethod]]:
    found = {name: getattr(lp, name) for name in lp.__all__}
    bases = (lp.PEFTMethod, lp.WeightMethod, lp.ActivationMethod, lp.SelectionMethod)
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, lp.PEFTMethod) and kind not in bases
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"--methods {path} is not valid YAML: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("methods"), dict) or not table["methods"]:
        raise InputError(
            f"--methods {path} needs a mapping 'methods', from a label to arguments, as in docs/compare.md"
        )
    if unknown := sorted(table.keys() - {"methods", "common"}):
        raise InputError(f"--methods {path} has unknown entries {unknown}: it may have 'methods' and 'common'")
    return table


def _candidate(
    label: str,
    entry: dict[str, Any],
    common: Mapping[str, Any],
    known: Mapping[str, type[lp.PEFTMethod]],
    fixed_rank: bool,
) -> Candidate:
    entry = dict(entry)
    name = _resolve(str(entry.pop("method", label)), label, known)
    accepted = {field.name for field in attrs.fields(known[name])}
    rate = entry.pop("lr", None)
    if isinstance(rate, str):  # YAML reads 1e-3 as a text
        rate = _number(rate, label, "lr")
    arguments = {n: value for n, value in common.items() if n in accepted and n not in entry}
    ranges: dict[str, Range | Choices] = {}
    for argument, value in entry.items():
        if argument not in accepted:
            near = nearest(argument, sorted(accepted), n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise InputError(f"{label}: {name} does not have an argument {argument!r}{hint}")
        found = _range(label, argument, value)
        if found is None:
            arguments[argument] = value
        else:
            ranges[argument] = found
    if not fixed_rank and "r" in accepted and "r" not in arguments | ranges and "alpha" in accepted:
        ranges["r"] = Choices(_RANKS)
    rate_range = _range(label, "lr", rate)
    if isinstance(rate_range, Choices):
        raise InputError(f"{label}: lr takes a number or a range {{low: 1e-4, high: 1e-2}}, not choices")
    return Candidate(label, name, arguments, ranges, rate_range or rate)


def _resolve(name: str, label: str, known: Iterable[str]) -> str:
    found = {each.lower(): each for each in known}.get(name.lower().replace("-", ""))
    if found is None:
        near = nearest(name, list(known), n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"{label}: there is no method {name!r}{hint}; lightning-peft methods lists them")
    return found


def _range(label: str, argument: str, value: Any) -> Range | Choices | None:
    """The range that a mapping describes; None for a fixed value."""
    if not isinstance(value, Mapping):
        return None
    if value.keys() == {"choices"} and isinstance(value["choices"], list) and value["choices"]:
        return Choices(tuple(value["choices"]))
    if not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        return None  # a dictionary argument, such as rank_pattern
    low, high = (_number(value[end], label, argument) for end in ("low", "high"))
    log = bool(value.get("log", argument == "lr"))
    if not low < high or (log and low <= 0):
        raise InputError(f"{label}: the range of {argument} from {low:g} to {high:g} is empty or not positive")
    if all(isinstance(value[end], int) for end in ("low", "high")):
        return Range(value["low"], value["high"], log)
    return Range(low, high, log)


def _number(value: Any, label: str, argument: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{label}: {argument} must be a number, got {value!r}") from None
