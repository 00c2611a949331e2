"""Where an activation method attaches: the input and output of a module, a block or a sub-layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.blocks import channels_first, find_blocks, find_sublayers, input_width, output_width
from lightning_peft.core.targeting.frozen_parts import why_frozen
from lightning_peft.core.targeting.patterns import TargetError, as_patterns, match, no_match, nothing_left
from lightning_peft.core.targeting.sites import find_sites, weight_sites

__all__ = ["ActivationSite", "find_activation_sites"]


@dataclass(frozen=True)
class ActivationSite:
    """A place for an activation adapter.

    Attributes:
        name: what a pattern matches and errors show.
        host: the name of the module that carries the adapter: the one whose output changes.
        module: that module.
        start: the name of the module whose input is the sub-layer's; ``host`` where it is its own.
        width: features of the output.
        axis: the dimension of the features: -1, or 1 for feature maps (N, C, ...).
        input_width: features of the sub-layer's input; None where no layer tells.
    """

    name: str
    host: str
    module: nn.Module = field(repr=False)
    start: str
    width: int
    axis: int = -1
    input_width: int | None = None


@dataclass(frozen=True)
class _Span:
    """From the input of one module to the output of another, or of the same."""

    start: str
    end: str
    width: int | None = None


_PLACES = {"all-attention": "attention", "all-feedforward": "feedforward"}


def find_activation_sites(
    model: nn.Module,
    targets: Any,
    exclude: Any = (),
    trainable: Iterable[str] = (),
    width: int | None = None,
    feature_maps: bool | None = None,
) -> list[ActivationSite]:
    """The places that a method's arguments name, one for each host, in model order.

    Args:
        model: any module.
        targets: ``"all-attention"`` and ``"all-feedforward"`` (the output of each such sub-layer, before residual sum
            and norm), ``"all-blocks"`` (the output of each block), ``"all-linear"``, or patterns of modules.
        exclude: patterns to take away again: of the places, or of modules around them.
        trainable: names of modules that train in full; the words above leave them out.
        width: features of the outputs, where the modules do not tell.
        feature_maps: whether the outputs are (N, C, ...), where the modules do not tell.

    Raises:
        TargetError: nothing is found; a module that is never called; a width that cannot be known.
    """
    modules = {name: module for name, module in base_modules(model) if name}
    chosen: dict[str, tuple[str, _Span]] = {}  # by host
    for pattern in as_patterns(targets, "targets"):
        for name, span in _places(pattern, model, modules, list(trainable)).items():
            chosen.setdefault(span.end, (name, span))
    gone: set[str] = set()
    for pattern in as_patterns(exclude, "exclude"):
        hits = {e for e, (name, _) in chosen.items() if any(match(pattern, n, modules[n]) for n in _around(e, name))}
        if not hits and not any(match(pattern, n, m) for n, m in modules.items()):
            raise TargetError(f"exclude: {no_match(pattern, modules)}")
        gone |= hits
    left = {end: place for end, place in chosen.items() if end not in gone}
    if not left:
        raise TargetError(nothing_left(targets, exclude))
    sites = []
    for end, (name, span) in left.items():
        features = width or span.width or output_width(modules[end])
        if features is None:
            raise TargetError(
                f"the number of features that {name!r} ({original_class(modules[end]).__name__}) gives cannot be told "
                "from its layers: set width= to it (and channels_first=True for feature maps)"
            )
        maps = channels_first(modules[end]) if feature_maps is None else feature_maps
        enters = input_width(modules[span.start])
        sites.append(ActivationSite(name, end, modules[end], span.start, features, 1 if maps else -1, enters))
    order = list(modules)
    return sorted(sites, key=lambda site: order.index(site.host))


def _around(*names: str) -> list[str]:
    parts = [name.split(".") for name in names]
    return [".".join(p[:i]) for p in parts for i in range(1, len(p) + 1)]


def _places(pattern: str, model: nn.Module, modules: dict[str, nn.Module], heads: list[str]) -> dict[str, _Span]:
    """What one pattern names, by the name it is shown under."""

    def free(name: str) -> bool:
        return not any(name == head or name.startswith(f"{head}.") for head in heads)

    if pattern in _PLACES:
        kind = _PLACES[pattern]
        found = {s.end: _Span(s.start, s.end, s.width) for s in find_sublayers(model) if s.kind == kind and free(s.end)}
        if not found:
            kinds = sorted({original_class(m).__name__ for _, m in find_blocks(model)})
            raise TargetError(
                f"targets={pattern!r}: nothing in this model looks like {kind.replace('forward', '-forward')} (its "
                f"blocks are {kinds}): use targets='all-blocks', or patterns of the modules to adapt{why_frozen(model)}"
            )
        return found
    if pattern == "all-blocks":
        hits = [name for name, _ in find_blocks(model) if name in modules and free(name)]
        if not hits:
            raise TargetError(
                "targets='all-blocks': this model has no blocks; use patterns of the modules to adapt"
                + why_frozen(model)
            )
    elif pattern == "all-linear":
        hits = list(dict.fromkeys(site.host for site in find_sites(model, "all-linear", (), heads)[0].values()))
    else:
        hits = [name for name, module in modules.items() if match(pattern, name, module)]
        if not hits:
            raise TargetError(f"targets: {no_match(pattern, modules)}")
    called = {site.host for site in weight_sites(model).values()}
    return {name: _span(name, modules, called) for name in hits}


def _span(name: str, modules: dict[str, nn.Module], called: set[str]) -> _Span:
    """From the input to the output of the module ``name``, whose last child carries the adapter where it is a
    ``Sequential``: that one would run a child ``adapters`` as one more of its layers."""
    start = end = name
    while isinstance(modules[end], nn.Sequential):
        children = [child for child, _ in modules[end].named_children()]
        if not children or f"{end}.{children[-1]}" not in modules:
            raise TargetError(f"{name!r} is a Sequential without a last layer of its own: adapt the module around it")
        start = f"{start}.{children[0]}" if start == end else start
        end = f"{end}.{children[-1]}"
    while isinstance(modules.get(start), nn.Sequential) and len(modules[start]):  # type: ignore[arg-type]
        start = f"{start}.{next(iter(dict(modules[start].named_children())))}"
    module, parent = modules[end], modules.get(end.rpartition(".")[0])
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        kind = original_class(module).__name__
        raise TargetError(f"{name!r} is a {kind}, which is never called: name what is in it, as in '{name}.*'")
    if isinstance(parent, nn.MultiheadAttention) and end not in called:
        raise TargetError(f"{name!r} is never called, its attention reads the weight: name {end.rpartition('.')[0]!r}")
    return _Span(start, end)
