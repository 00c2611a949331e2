"""Find where a weight method attaches: one weight of one module, presented as a matrix W (out x in).

The :class:`~lightning_peft.core.targeting.layouts.WeightLayout` of a site converts its stored weight to that matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, join, leaf, owner_of
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.computed_weights import effective_tensors, is_computed, steady_tensor
from lightning_peft.core.targeting.frozen_parts import in_frozen_part, why_frozen
from lightning_peft.core.targeting.layouts import (
    NormLayout,
    OtherLinearLayout,
    PackedLayout,
    WeightLayout,
    layout_of,
)
from lightning_peft.core.targeting.output_head import find_output_head
from lightning_peft.core.targeting.packed import (
    COMPRESSED,
    dequantized,
    is_compressed,
    linear_sizes,
    own_tensors,
    packed_problem,
)
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.core.targeting.recurrent import RecurrentLayout, recurrent_weights
from lightning_peft.core.targeting.selection import select
from lightning_peft.core.targeting.storage import storage_problem

__all__ = [
    "Site",
    "accepted_hint",
    "check_stored",
    "find_sites",
    "matches_site",
    "norm_sites",
    "output_head",
    "weight_sites",
]


@dataclass(frozen=True)
class Site:
    """One weight that a weight method can adapt.

    Attributes:
        name: the name that patterns match and tables show: that of the module, or of a bare parameter.
        host: the qualified name of the module that carries the adapter.
        module: the host module.
        parameter: the weight's name inside the host; ``out_proj.weight`` for an attention's output projection.
        layout: how the stored weight becomes a matrix.
        linear_like: whether ``targets="all-linear"`` includes this weight.
    """

    name: str
    host: str
    module: nn.Module = field(repr=False)
    parameter: str
    layout: WeightLayout = field(repr=False)
    linear_like: bool = False

    @property
    def weight(self) -> Tensor:
        """The stored weight; of a packed layer, or one that computes its weight from parameters, its value now.

        Raises:
            TargetError: if the weight is quantised or packed.
        """
        check_stored([self])
        return dequantized(self.module) if self.is_packed else cast(Tensor, steady_tensor(self.module, self.parameter))

    @property
    def is_computed(self) -> bool:
        """Whether the module computes the weight from other parameters (weight norm, spectral norm, pruning, ...)."""
        return is_computed(self.module, self.parameter)

    @property
    def is_packed(self) -> bool:
        """Whether the weight is quantised or packed, so that only its layer can compute with it."""
        return isinstance(self.layout, PackedLayout)

    @property
    def is_bare(self) -> bool:
        """Whether the weight is a parameter of a module that is not a known kind of layer."""
        return type(self.layout) is WeightLayout and not isinstance(self.module, nn.MultiheadAttention)

    @property
    def is_part(self) -> bool:
        """Whether it is one of several weights of a layer, such as an attention's projections."""
        return self.name != self.host and not self.is_bare

    @property
    def bias(self) -> str | None:
        """The name of the bias that the layer adds, or could add, to the product with the weight; None if it cannot."""
        name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(leaf(self.parameter))
        if self.is_packed:
            return "bias"
        biases = self.module.get_submodule(owner_of(self.parameter))._parameters
        if name not in biases or not self.is_bare:
            return name if name in biases else None
        bias = biases[name]
        return name if bias is not None and len(self.shape) == 2 and bias.shape == self.shape[:1] else None

    @property
    def shape(self) -> torch.Size:
        """The matrix's shape: (out, in), or (batch, out, in) for stacked experts."""
        if self.is_packed:
            return torch.Size(linear_sizes(self.module) or ())
        return self.matrix.shape

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix of :attr:`shape`, detached, in its stored dtype and on its device."""
        return self.layout.matrix(self.weight.detach())


def check_stored(sites: Iterable[Site]) -> None:
    """Refuse weights that are quantised or packed.

    Raises:
        TargetError: if there are any; the message lists all of them.
    """
    problems = {site.name: why for site in sites if (why := _unusable(site)) is not None}
    if problems:
        name, why = next(iter(problems.items()))
        raise TargetError(
            f"the weight of {name!r} {why}. Adapters on it are not supported. Exclude it (exclude={list(problems)}), "
            "or load the model with plain dense weights"
        )


def _unusable(site: Site) -> str | None:
    """Why adapters cannot work on the stored weight; None if they can."""
    if is_compressed(site.module):
        return COMPRESSED
    if not site.is_packed:
        weight = steady_tensor(site.module, site.parameter)
        return "has no value" if weight is None else storage_problem(weight)
    problem = packed_problem(site.module)
    if problem is None:
        return None
    tensors = (storage_problem(t) for _, t in own_tensors(site.module))
    stored = next(filter(None, tensors), "is packed")
    return f"{stored}, and its layer ({original_class(site.module).__name__}) cannot be adapted as it is: {problem}"


def weight_sites(model: nn.Module) -> dict[str, Site]:
    """Return every weight of ``model`` that a weight method can adapt, by name, in model order."""
    sites: dict[str, Site] = {}
    skip: set[int] = set()
    for name, module in base_modules(model):
        if id(module) not in skip:
            sites |= {site.name: site for site in _sites_of(name, module)}
        if isinstance(module, nn.MultiheadAttention):
            skip.add(id(module.out_proj))  # the attention reads its weight directly and never calls its forward
    return sites


def norm_sites(model: nn.Module) -> dict[str, Site]:
    """Return the weights of the norm layers of ``model`` by name; norm layers without a weight are left out."""
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
    if weights := recurrent_weights(module):
        return [Site(join(name, p), name, module, p, RecurrentLayout(), linear_like=True) for p in weights]
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return []  # a container would run the adapter as another layer
    if getattr(module, "max_norm", None) is not None:
        return []  # the embedding rescales its entries when it runs, so frozen entries would not stay frozen
    if isinstance(module, ParametrizationList):
        return []  # the weight is what it computes from its parameters, not the parameters
    bare = {p: t for p, t in effective_tensors(module).items() if t is not None and t.ndim in (2, 3)}
    return [Site(join(name, p), name, module, p, WeightLayout()) for p, t in bare.items() if t.is_floating_point()]


def find_sites(
    model: nn.Module,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    trainable: Iterable[str] = (),
    sites: dict[str, Site] | None = None,
    words: Mapping[str, Callable[[], Iterable[str]]] = MappingProxyType({}),
) -> tuple[dict[str, Site], list[str]]:
    """Return the sites that a method's arguments select, and the output heads that ``all-linear`` left out.

    Args:
        model: any module.
        targets: ``"all-linear"`` or patterns (see :mod:`lightning_peft.core.targeting.patterns`). ``all-linear`` means
            every linear-like layer except the output head and modules that ``trainable`` trains in full.
        exclude: patterns for sites to leave out.
        trainable: names of modules that train in full; they are never adapted as well.
        sites: the sites to choose from; by default all of :func:`weight_sites`.
        words: the method's own reserved words, each with a function that returns the names of its sites.

    Raises:
        TargetError: if a pattern matches nothing or only layers that cannot be adapted, or if nothing is left.
    """
    sites = weight_sites(model) if sites is None else sites
    modules = {name: module for name, module in base_modules(model) if name}
    free = {name: site for name, site in sites.items() if not is_within(name, *trainable)}
    heads: list[str] = []

    def all_linear() -> list[str]:
        left_alone, head = in_frozen_part(model), output_head(model, sites)
        heads.extend(name for name in sites if name == head)
        linear = [n for n, site in free.items() if site.linear_like and n != head and not left_alone(n)]
        if not linear:
            raise TargetError(_no_linear(model, sites, heads, free))
        return linear

    def missing(pattern: str) -> str:
        hits = [n for n, site in sites.items() if matches_site(pattern, site)]
        if hits:
            return f"{pattern!r} matches only modules that train in full, {hits}: remove it from targets or trainable"
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


def _no_linear(model: nn.Module, sites: dict[str, Site], heads: list[str], free: dict[str, Site]) -> str:
    besides = f" besides the output head {heads[0]!r}" if heads else ""
    if not sites:
        kinds = sorted({original_class(m).__name__ for n, m in base_modules(model) if n})
        return f"targets='all-linear' finds no linear layer, and no other weight to adapt, in {kinds[:12]}"
    hints = [f"type:{original_class(site.module).__name__}" for site in sites.values()] + [*sites]
    hint = accepted_hint(hints, {name: site for name, site in free.items() if name not in heads})
    example = f": name what to adapt, for example targets={hint!r}" if hint else ""
    kinds = sorted({original_class(site.module).__name__ for site in sites.values()})
    return f"targets='all-linear' finds no linear layer{besides}; this model has {kinds}{example}{why_frozen(model)}"


def accepted_hint(patterns: Iterable[str], sites: Mapping[str, Site]) -> str | None:
    """Return the first of ``patterns`` that :func:`find_sites` accepts, so that messages suggest only patterns that
    work.

    A bare parameter, for example, is matched by its name only, not by the type of its module.
    """
    for pattern in dict.fromkeys(patterns):
        hits = [site for site in sites.values() if matches_site(pattern, site)]
        try:
            check_stored(hits)
        except TargetError:
            continue
        if hits:
            return pattern
    return None


def matches_site(pattern: str, site: Site) -> bool:
    """Whether ``pattern`` matches the site; for a bare parameter, the pattern must contain the parameter's name."""
    if site.is_bare and not re.search(rf"(?<!\w){re.escape(site.parameter)}(?!\w)", pattern):
        return False  # a glob for modules must not adapt bare parameters (a position table, experts) by accident
    if match(pattern, site.name, site.module):
        return True
    if isinstance(site.layout, OtherLinearLayout):  # its parameter can be named as well
        return pattern.endswith("weight") and match(pattern, join(site.host, site.parameter), site.module)
    return site.is_part and match(pattern, site.host, site.module)


def _nothing_to_adapt(pattern: str, modules: Mapping[str, nn.Module], sites: dict[str, Site]) -> str:
    hits = [(name, module) for name, module in modules.items() if match(pattern, name, module)]
    if not hits:
        owners = {name: site.module for name, site in sites.items()}
        return no_match(pattern, owners, lambda hint: accepted_hint([hint], sites) is not None)
    name, module = hits[0]
    kind = original_class(module).__name__
    inside = [n for n in sites if n != name and is_within(n, name)]
    if bare := [n for n in inside if sites[n].host == name]:
        return f"{pattern!r} matches {name!r} ({kind}); only its parameters can be adapted: {', '.join(bare)}"
    if inside:
        hint = accepted_hint([f"{pattern}.*", f"{name}.*", *inside], sites)
        nearest = f"; nearest: {hint!r}" if hint else ""
        return f"{pattern!r} matches {name!r} ({kind}), which contains layers but is not one{nearest}"
    if getattr(module, "max_norm", None) is not None:
        return f"{pattern!r} matches {name!r} ({kind}), which has max_norm and rescales its own weight when it runs"
    return (
        f"{pattern!r} matches {name!r} ({kind}), which has no weight to adapt; a weight method adapts Linear, "
        "Conv1d/2d/3d, ConvTranspose1d/2d/3d, Conv1D, Embedding, MultiheadAttention, LSTM, GRU, RNN and 2-D or 3-D "
        "parameters"
    )


def output_head(model: nn.Module, sites: dict[str, Site] | None = None) -> str | None:
    """Return the name of the layer that produces the model's output, or None if there is none or it is unknown.

    Three ways to find it are tried in turn:

    1. ``get_output_embeddings()`` of a Hugging Face model;
    2. the linear-like layer that the output of a trial forward comes from;
    3. if a trial is not possible, the last linear-like layer in model order, unless an earlier one is named like a
       head and the last one lies in another part of the model.

    A layer in a part that the user froze is never the head, and neither is one of many repeated layers
    (``layers.11.mlp.down_proj``, the last of a ``ModuleList``).
    """
    return find_output_head(model, weight_sites(model) if sites is None else sites)
