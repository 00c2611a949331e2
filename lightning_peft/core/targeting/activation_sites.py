"""Find where an activation method attaches: the input and output of a module, a block or a sub-layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from torch import nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, owner_of
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.blocks import channels_first, find_blocks, find_sublayers, input_width, output_width
from lightning_peft.core.targeting.frozen_parts import why_frozen
from lightning_peft.core.targeting.patterns import TargetError
from lightning_peft.core.targeting.selection import select
from lightning_peft.core.targeting.sites import find_sites, weight_sites

__all__ = ["ActivationSite", "find_activation_sites"]


@dataclass(frozen=True)
class ActivationSite:
    """A place where an activation adapter can attach.

    Attributes:
        name: the name that patterns match and errors show.
        host: the name of the module that carries the adapter and whose output it changes.
        module: the host module.
        start: the name of the module whose input is the sub-layer's input; often the same as ``host``.
        width: number of features of the output.
        axis: dimension of the features: -1, or 1 for feature maps (N, C, ...).
        input_width: number of features of the sub-layer's input; None if it is unknown.
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
    """The path from the input of module ``start`` to the output of module ``end``, which may be the same module."""

    start: str
    end: str
    width: int | None = None


_PLACES = {"all-attention": "attention", "all-feedforward": "feedforward"}


def find_activation_sites(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    trainable: Iterable[str] = (),
    width: int | None = None,
    feature_maps: bool | None = None,
) -> list[ActivationSite]:
    """Return the places that a method's arguments select, one per host, in model order.

    Args:
        model: any module.
        targets: ``"all-attention"`` and ``"all-feedforward"`` (the output of each such sub-layer, before residual sum
            and norm), ``"all-blocks"`` (the output of each block), ``"all-linear"``, or patterns of modules.
        exclude: patterns that match places to leave out, or modules around them.
        trainable: names of modules that train in full; the reserved words skip them.
        width: number of output features, for modules whose layers do not show it.
        feature_maps: whether the outputs are (N, C, ...), for modules whose layers do not show it.

    Raises:
        TargetError: if nothing is found, a selected module is never called, or its width cannot be determined.
    """
    modules = {name: module for name, module in base_modules(model) if name}
    called = {site.host for site in weight_sites(model).values()}
    spans: dict[str, _Span] = {}  # the sub-layers found for reserved words, by the name of their last module

    def free(names: Iterable[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if not is_within(name, *heads)]

    def sublayers(word: str) -> list[str]:
        found = {s.end: _Span(s.start, s.end, s.width) for s in find_sublayers(model) if s.kind == _PLACES[word]}
        spans.update(found)
        return free(found) or _no_sublayer(word, model)

    def span(name: str) -> _Span:
        return spans.get(name) or _span(name, modules, called)

    heads = list(trainable)
    words = {word: partial(sublayers, word) for word in _PLACES} | {
        "all-blocks": lambda: free(n for n, _ in find_blocks(model) if n in modules) or _no_blocks(model),
        "all-linear": lambda: [site.host for site in find_sites(model, "all-linear", (), heads)[0].values()],
    }
    chosen: dict[str, tuple[str, _Span]] = {}  # by host
    for name in select(modules, targets, exclude, words, places=lambda name: (name, span(name).end)):
        chosen.setdefault(span(name).end, (name, span(name)))
    sites = []
    for end, (name, place) in chosen.items():
        features = width or place.width or output_width(modules[end])
        if features is None:
            raise TargetError(
                f"the output width of {name!r} ({original_class(modules[end]).__name__}) cannot be determined from "
                "its layers: pass width= (and channels_first=True for feature maps)"
            )
        maps = channels_first(modules[end]) if feature_maps is None else feature_maps
        enters = input_width(modules[place.start])
        sites.append(ActivationSite(name, end, modules[end], place.start, features, 1 if maps else -1, enters))
    order = list(modules)
    return sorted(sites, key=lambda site: order.index(site.host))


def _no_sublayer(word: str, model: nn.Module) -> NoReturn:
    kinds = sorted({original_class(m).__name__ for _, m in find_blocks(model)})
    raise TargetError(
        f"targets={word!r}: nothing in this model looks like {_PLACES[word].replace('forward', '-forward')} (its "
        f"blocks are {kinds}): use targets='all-blocks', or patterns for the modules to adapt{why_frozen(model)}"
    )


def _no_blocks(model: nn.Module) -> NoReturn:
    raise TargetError(
        "targets='all-blocks': this model has no blocks; use patterns for the modules to adapt" + why_frozen(model)
    )


def _span(name: str, modules: dict[str, nn.Module], called: set[str]) -> _Span:
    """Return the span of the module ``name``.

    For a ``Sequential``, the last child carries the adapter, because the container would run a child ``adapters`` as
    another of its layers.
    """
    start = end = name
    while isinstance(modules[end], nn.Sequential):
        children = [child for child, _ in modules[end].named_children()]
        if not children or f"{end}.{children[-1]}" not in modules:
            raise TargetError(f"{name!r} is a Sequential without a last layer to adapt: adapt the module around it")
        start = f"{start}.{children[0]}" if start == end else start
        end = f"{end}.{children[-1]}"
    while isinstance(modules.get(start), nn.Sequential) and len(modules[start]):  # type: ignore[arg-type]
        start = f"{start}.{next(iter(dict(modules[start].named_children())))}"
    module, parent = modules[end], modules.get(owner_of(end))
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        kind = original_class(module).__name__
        raise TargetError(f"{name!r} is a {kind}, which is never called: name the modules inside it, as in '{name}.*'")
    if isinstance(parent, nn.MultiheadAttention) and end not in called:
        raise TargetError(f"{name!r} is never called: the attention reads its weight. Name {owner_of(end)!r} instead")
    return _Span(start, end)
