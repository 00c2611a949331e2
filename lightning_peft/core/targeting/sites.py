"""Where a weight method attaches: one weight of one module, seen as a matrix W (out x in).

How a stored weight reads as a matrix is its :class:`~lightning_peft.core.targeting.layouts.WeightLayout`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, join, leaf, owner_of
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part, why_frozen
from lightning_peft.core.targeting.layouts import NormLayout, WeightLayout, layout_of
from lightning_peft.core.targeting.output_head import find_output_head
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.core.targeting.selection import select
from lightning_peft.core.targeting.storage import is_encoded_layer, storage_problem

__all__ = ["Site", "check_stored", "find_sites", "matches_site", "norm_sites", "output_head", "weight_sites"]


@dataclass(frozen=True)
class Site:
    """One weight that a weight method can adapt.

    Attributes:
        name: what a pattern matches and a table shows: the module, or the parameter where it is bare.
        host: the qualified name of the module that carries the adapter.
        module: that module.
        parameter: the weight's name inside the host; ``out_proj.weight`` for an attention's output projection.
        layout: how the weight reads as a matrix.
        linear_like: whether ``all-linear`` means it.
    """

    name: str
    host: str
    module: nn.Module = field(repr=False)
    parameter: str
    layout: WeightLayout = field(repr=False)
    linear_like: bool = False

    @property
    def weight(self) -> Tensor:
        """The stored weight itself.

        Raises:
            TargetError: it is computed from other parameters.
        """
        check_stored([self])
        return self.module.get_parameter(self.parameter)

    @property
    def is_computed(self) -> bool:
        """Whether the module computes the weight from other parameters before it runs: weight norm, pruning, ..."""
        module = self.module.get_submodule(owner_of(self.parameter))
        return parametrize.is_parametrized(module) or module._parameters.get(leaf(self.parameter)) is None

    @property
    def is_bare(self) -> bool:
        """Whether it is a parameter of a module that is not a layer of a known kind."""
        return type(self.layout) is WeightLayout and not isinstance(self.module, nn.MultiheadAttention)

    @property
    def bias(self) -> str | None:
        """The name of the bias that the layer adds, or could add, to its product with the weight; None without one."""
        name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(leaf(self.parameter))
        biases = self.module.get_submodule(owner_of(self.parameter))._parameters
        if name not in biases or not self.is_bare:
            return name if name in biases else None
        bias = biases[name]
        return name if bias is not None and len(self.shape) == 2 and bias.shape == self.shape[:1] else None

    @property
    def shape(self) -> torch.Size:
        """The matrix's shape: (out, in), or (batch, out, in) for stacked experts."""
        return self.layout.matrix(self.weight).shape


def check_stored(sites: Iterable[Site]) -> None:
    """Refuse weights that are computed from other parameters, and those that are quantised or packed.

    Raises:
        TargetError: names them all.
    """
    sites = list(sites)
    computed = [site.name for site in sites if site.is_computed]
    if computed:
        raise TargetError(
            f"{', '.join(map(repr, computed))}: the weight is not a parameter, since weight norm, spectral norm, "
            "pruning or another parametrization computes it from others before each call, and would undo "
            f"any change of it. Exclude it (exclude={computed}), or remove the parametrization first: "
            "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove"
        )
    weights = {site.name: site.module.get_parameter(site.parameter) for site in sites}
    problems = {name: why for name, weight in weights.items() if (why := storage_problem(weight)) is not None}
    if problems:
        name, why = next(iter(problems.items()))
        raise TargetError(
            f"the weight of {name!r} {why}: adapters of such weights are not supported yet, since they could be "
            f"neither computed exactly nor merged. Exclude it, or load the model unquantised "
            f"(exclude={list(problems)})"
        )


def weight_sites(model: nn.Module) -> dict[str, Site]:
    """Every weight of ``model`` that a weight method can adapt, by name, in model order."""
    sites: dict[str, Site] = {}
    skip: set[int] = set()
    for name, module in base_modules(model):
        if id(module) not in skip:
            sites |= {site.name: site for site in _sites_of(name, module)}
        if isinstance(module, nn.MultiheadAttention):
            skip.add(id(module.out_proj))  # its weight is read by the attention; its forward never runs
    return sites


def norm_sites(model: nn.Module) -> dict[str, Site]:
    """The weights of the norm layers of ``model``, by name; layers without a weight have none."""
    norms = {n: m for n, m in base_modules(model) if n and "Norm" in original_class(m).__name__}
    owned = {n: m for n, m in norms.items() if m._parameters.get("weight") is not None}
    return {n: Site(n, n, m, "weight", NormLayout()) for n, m in owned.items()}


def _sites_of(name: str, module: nn.Module) -> list[Site]:
    if isinstance(module, nn.MultiheadAttention):
        packed = ("in_proj_weight",) if module.in_proj_weight is not None else ()
        names = packed or ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        sites = [Site(join(name, p), name, module, p, WeightLayout(), linear_like=True) for p in names]
        return [*sites, Site(join(name, "out_proj"), name, module, "out_proj.weight", WeightLayout(), linear_like=True)]
    if (found := layout_of(module)) is not None:
        layout, linear_like = found
        return [Site(name, name, module, "weight", layout, linear_like)] if name else []
    if isinstance(module, nn.RNNBase | nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return []  # an RNN reads a flattened copy of its weights; a container would run the adapter as a layer
    if getattr(module, "max_norm", None) is not None:
        return []  # an embedding that rescales its own rows as it runs: frozen rows would not stay frozen
    bare = {p: t for p, t in module._parameters.items() if t is not None and t.ndim in (2, 3)}
    return [Site(join(name, p), name, module, p, WeightLayout()) for p, t in bare.items() if t.is_floating_point()]


def find_sites(
    model: nn.Module,
    targets: Any,
    exclude: Any = (),
    trainable: Iterable[str] = (),
    sites: dict[str, Site] | None = None,
    words: Mapping[str, Callable[[], Iterable[str]]] = MappingProxyType({}),
) -> tuple[dict[str, Site], list[str]]:
    """The sites that a method's arguments name, and the layers that ``all-linear`` leaves out.

    Args:
        model: any module.
        targets: ``"all-linear"`` or patterns (see :mod:`lightning_peft.core.targeting.patterns`). ``all-linear`` means
            every linear-like layer but the output head and what ``trainable`` trains in full.
        exclude: patterns to take away again.
        trainable: names of modules that train in full; never adapted as well.
        sites: what there is to choose from; by default all of :func:`weight_sites`.
        words: the method's own reserved words, each with a function that returns the names of the sites it means.

    Raises:
        TargetError: a pattern matches nothing, or only layers that cannot be adapted; or nothing is left.
    """
    sites = weight_sites(model) if sites is None else sites
    modules = {name: module for name, module in base_modules(model) if name}
    free = {name: site for name, site in sites.items() if not is_within(name, *trainable)}
    heads: list[str] = []

    def all_linear() -> list[str]:
        left_alone, head = in_frozen_part(model), output_head(model, sites)
        heads.extend(name for name in sites if name == head)
        _check_encoded(
            {n: m for n, m in modules.items() if n not in sites and is_encoded_layer(m) and not left_alone(n)}
        )
        linear = [n for n, site in free.items() if site.linear_like and n != head and not left_alone(n)]
        if not linear:
            raise TargetError(_no_linear(model, sites, heads))
        return linear

    def missing(pattern: str) -> str:
        hits = [n for n, site in sites.items() if matches_site(pattern, site)]
        if hits:
            return f"{pattern!r} matches only what trains in full, {hits}: take it out of targets or of trainable"
        return _nothing_to_adapt(pattern, modules, sites)

    chosen = select(
        modules,
        targets,
        exclude,
        {"all-linear": all_linear, **words},
        candidates=lambda pattern: [n for n, site in free.items() if matches_site(pattern, site)],
        places=lambda name: (sites[name].host,),
        missing=missing,
    )
    return {n: sites[n] for n in sites if n in chosen}, heads


def _check_encoded(layers: Mapping[str, nn.Module]) -> None:
    if layers:
        kinds = ", ".join(sorted({original_class(layer).__name__ for layer in layers.values()}))
        raise TargetError(
            f"targets='all-linear': {', '.join(layers)} ({kinds}) hold quantised or packed weights, which are not "
            "supported yet. Name the layers to adapt in targets, or load the model unquantised"
        )


def _no_linear(model: nn.Module, sites: dict[str, Site], heads: list[str]) -> str:
    besides = f" besides the output head {heads[0]!r}" if heads else ""
    if not sites:
        kinds = sorted({original_class(m).__name__ for n, m in base_modules(model) if n})
        return f"targets='all-linear' finds no linear layer, and no other weight to adapt, in {kinds[:12]}"
    # A hint is offered only if it matches: a bare parameter is named, never its module's type.
    hints = [f"type:{original_class(site.module).__name__}" for site in sites.values()] + [*sites]
    others = [site for name, site in sites.items() if name not in heads]
    hint = next((h for h in hints if any(matches_site(h, site) for site in others)), None)
    example = f": name what to adapt, for example targets={hint!r}" if hint else ""
    kinds = sorted({original_class(site.module).__name__ for site in sites.values()})
    return f"targets='all-linear' finds no linear layer{besides}; this model has {kinds}{example}{why_frozen(model)}"


def matches_site(pattern: str, site: Site) -> bool:
    """Whether ``pattern`` names the site; a bare parameter only if it contains the parameter's name."""
    bare = site.name != site.host and not isinstance(site.module, nn.MultiheadAttention)
    if bare and not re.search(rf"(?<!\w){re.escape(site.parameter)}(?!\w)", pattern):
        return False  # a bare parameter (a position table, experts) is adapted only when named
    if match(pattern, site.name, site.module):
        return True
    return isinstance(site.module, nn.MultiheadAttention) and match(pattern, site.host, site.module)


def _nothing_to_adapt(pattern: str, modules: Mapping[str, nn.Module], sites: dict[str, Site]) -> str:
    hits = [(name, module) for name, module in modules.items() if match(pattern, name, module)]
    if not hits:
        return no_match(pattern, {name: site.module for name, site in sites.items()})
    name, module = hits[0]
    if is_encoded_layer(module):
        return (
            f"{pattern!r} matches {name!r} ({original_class(module).__name__}), whose weight is quantised or packed: "
            "this is not supported yet, so load the model unquantised"
        )
    kind = original_class(module).__name__
    inside = [n for n in sites if n != name and is_within(n, name)]
    if bare := [n for n in inside if sites[n].host == name]:
        return f"{pattern!r} matches {name!r} ({kind}), of which only the parameters can be named: {', '.join(bare)}"
    if inside:
        return f"{pattern!r} matches {name!r} ({kind}), which holds layers but is none; nearest: '{pattern}.*'"
    if isinstance(module, nn.Embedding):
        return f"{pattern!r} matches {name!r}, an Embedding with max_norm, which rescales its own weight as it runs"
    if isinstance(module, nn.RNNBase):
        return (
            f"{pattern!r} matches {name!r} ({kind}), which reads a flattened copy of its weights; "
            "adapt the layers around it"
        )
    return (
        f"{pattern!r} matches {name!r} ({kind}), which has no weight to adapt; a weight method adapts Linear, "
        "Conv1d/2d/3d, ConvTranspose1d/2d/3d, Conv1D, Embedding, MultiheadAttention and 2-D or 3-D parameters"
    )


def output_head(model: nn.Module, sites: dict[str, Site] | None = None) -> str | None:
    """The name of the layer that makes the model's output, or None if there is none or it is unknown.

    It is what a Hugging Face model's ``get_output_embeddings`` says; else the linear-like layer that the output of a
    trial forward comes from; else, where the model cannot be tried, the last one in model order, unless an earlier one
    is named like a head and the last lies in another part. Parts that the user froze hold none, nor is a layer of a
    repeated kind one (``layers.11.mlp.down_proj``, the last of a ``ModuleList``).
    """
    return find_output_head(model, weight_sites(model) if sites is None else sites)
