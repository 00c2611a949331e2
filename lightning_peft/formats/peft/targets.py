"""Resolve PEFT's targets to modules of a base as PEFT does, and write targets that PEFT resolves to exactly these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.optional import output_embedding
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.base_modules import base_parameters
from lightning_peft.core.targeting.patterns import no_match
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.peft.converter import NotInPeftError, Options

__all__ = ["heads_of", "parameters_of", "resolve", "target_modules", "target_parameters"]


def target_modules(names: Iterable[str], base: Base) -> list[str] | str:
    """Return ``target_modules`` that PEFT resolves to exactly the modules in ``names``.

    This is a list of full names, or a regular expression if one of them is also the end of another module's name.
    """
    names = sorted(set(names))
    others = base.modules().keys() - set(names)
    ends = {other[i + 1 :] for other in others for i, character in enumerate(other) if character == "."}
    if not ends.isdisjoint(names):
        return "|".join(re.escape(name) for name in names)
    return names


def resolve(options: Options, base: Base) -> list[str]:
    """Return the names of the modules of ``base`` that ``target_modules`` selects, as PEFT resolves it.

    ``exclude_modules``, ``modules_to_save``, ``layers_to_transform`` and ``layers_pattern`` narrow the selection.

    Raises:
        FormatError: if the options select nothing.
    """
    targets = options.get("target_modules")
    exclude, heads = options.get("exclude_modules"), options.get("modules_to_save") or []
    indices, layers = options.get("layers_to_transform"), options.get("layers_pattern")
    modules = {name: module for name, module in base.modules().items() if name}
    if targets is None or targets == []:
        if options.get("target_parameters"):
            return []
        raise FormatError("target_modules is missing: the configuration does not say which modules are adapted")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(base, modules, options.get("task_type"))
    found = []
    for name in modules:
        if exclude and _named(exclude, name):
            continue
        if any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in heads):
            continue
        # PEFT ignores layers_to_transform for a regular expression and for a full name in a list.
        narrowed = not isinstance(targets, str) and name not in targets
        if _named(targets, name) and (not narrowed or _in_layers(name, indices, layers)):
            found.append(name)
    if not found:
        missing = targets if isinstance(targets, str) else sorted(targets)[0]
        raise FormatError(f"target_modules: {no_match(missing, modules)}")
    return found


def _named(patterns: str | Sequence[str], name: str) -> bool:
    """Whether ``patterns`` match ``name``: a string is a regular expression for all of it, a list holds suffixes."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return name in patterns or any(name.endswith(f".{pattern}") for pattern in patterns)


def _in_layers(name: str, indices: int | list[int] | None, patterns: str | list[str] | None) -> bool:
    if indices is None or indices == []:
        return True
    wanted = [indices] if isinstance(indices, int) else indices
    named = [patterns] if isinstance(patterns, str) else patterns or []
    # The lazy .*? finds the first number, which is the layer index; a later one may be the index of an expert inside
    # it.
    starts = [rf"(?:^|.*?\.){pattern}" for pattern in named] or [r".*?\.[^.]*"]
    found = next((m for start in starts if (m := re.match(rf"{start}\.(?P<index>\d+)\.", name))), None)
    return found is not None and int(found["index"]) in wanted


def _all_linear(base: Base, modules: Mapping[str, nn.Module], task: Any) -> list[str]:
    head = output_embedding(base.module)
    if head is None and task == "SEQ_CLS":
        head = next((h for n in ("score", "classifier") if (h := getattr(base.module, n, None)) is not None), None)
    kinds = ("Linear", "Conv1D")
    linear = (n for n, m in modules.items() if any(c.__name__ in kinds for c in original_class(m).__mro__))
    return [name for name in linear if modules[name] is not head]


def heads_of(patterns: Sequence[str], base: Base, option: str = "modules_to_save") -> list[str]:
    """The modules that ``modules_to_save`` (or a similar option) selects, matched with ``str.endswith`` as PEFT does.

    Raises:
        FormatError: if a pattern matches no module.
    """
    modules = {f"base_model.model.{name}": name for name in base.modules() if name}
    found = []
    for pattern in patterns:
        hits = [name for full, name in modules.items() if full.endswith(pattern)]
        if not hits:
            raise FormatError(f"{option}: {no_match(pattern, base.modules())}")
        found += [hit for hit in hits if hit not in found]
    return found


def target_parameters(names: Sequence[str], base: Base) -> list[str]:
    """Return ``target_parameters`` that PEFT resolves to exactly the parameters in ``names``.

    Raises:
        NotInPeftError: if one of them is the end of another parameter's name.
    """
    for other, _ in base_parameters(base.module):
        for name in names:
            if other.endswith(f".{name}") and other not in names:
                raise NotInPeftError(f"PEFT would also adapt {other!r}, because its name ends in {name!r}")
    return sorted(names)


def parameters_of(patterns: Sequence[str], base: Base) -> dict[str, list[str]]:
    """The parameters that ``target_parameters`` selects: module -> names in it, in the order of the module.

    Raises:
        FormatError: if a pattern matches no parameter.
    """
    found: dict[str, list[str]] = {}
    hit: set[str] = set()
    for host, module in base.modules().items():
        for parameter in module._parameters:
            name = f"{host}.{parameter}"
            means = [p for p in patterns if name == p or name.endswith(f".{p}")]
            if means and module._parameters[parameter] is not None:
                found.setdefault(host, []).append(parameter)
                hit.update(means)
    for pattern in patterns:
        if pattern not in hit:
            raise FormatError(f"target_parameters: {pattern!r} matches no parameter of this base")
    return found
