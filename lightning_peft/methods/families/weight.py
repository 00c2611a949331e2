"""The family of weight methods: an adapter computes a new matrix from each targeted matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import cast

from torch import nn

from lightning_peft.core.adapters.base import Adapter, WeightAdapter, WeightGroup
from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import is_within, join, listed
from lightning_peft.core.state.adapter_records import layer_kind
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.frozen_parts import in_frozen_part
from lightning_peft.core.targeting.layouts import weight_name
from lightning_peft.core.targeting.left_out import left_out_notes
from lightning_peft.core.targeting.output_head import how_head_was_found
from lightning_peft.core.targeting.packed import parameter_sizes
from lightning_peft.core.targeting.patterns import TargetError, as_patterns
from lightning_peft.core.targeting.sites import Site, check_stored, find_sites, matches_site, weight_sites
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["WeightMethod", "above_both_sides", "check_bias", "check_dropout", "check_low_rank"]


class WeightMethod(PEFTMethod):
    """Base class of the methods that change weights; a subclass implements :meth:`build`.

    Example::

        class Shift(lp.WeightMethod):
            def build(self, site):
                return ShiftAdapter(site)

        class ShiftAdapter(lp.WeightAdapter):
            def __init__(self, site):
                super().__init__(site)
                self.rows = nn.Parameter(torch.zeros(site.shape[-2], 1))

            def delta(self, weight):
                return self.rows.expand_as(weight)
    """

    @abstractmethod
    def build(self, site: Site) -> WeightAdapter:
        """Return a new, initialised adapter for ``site``; torch's global generator is seeded for the call.

        Raises:
            ValueError: if the arguments do not fit this weight.
        """
        raise NotImplementedError

    def too_small(self, site: Site) -> str | None:
        """The reason why the weight at ``site`` is too small for the arguments; None if it is not.

        ``all-linear`` skips such weights. If a pattern names one, :meth:`build` raises an error.
        """
        return None

    def _without_small(self, sites: dict[str, Site], plan: Plan) -> dict[str, Site]:
        """``sites`` without the small ones that only ``all-linear`` matches; all of them if none would remain."""
        small = {name: why for name, site in sites.items() if (why := _empty(site) or self.too_small(site)) is not None}
        named = [p for p in (as_patterns(self.targets, "targets") if small else ()) if p != "all-linear"]
        left = {n: why for n, why in small.items() if not any(matches_site(p, sites[n]) for p in named)}
        if not left or len(left) == len(sites):
            return sites
        plan.notes.append(f"all-linear skips {listed(left)} (too small): {next(iter(left.values()))}")
        return {name: site for name, site in sites.items() if name not in left}

    def find(self, model: nn.Module, heads: list[str]) -> tuple[dict[str, Site], list[str]]:
        """The weights to adapt, by name, and the names of the output heads that are skipped; see :func:`find_sites`."""
        return find_sites(model, self.targets, self.exclude, heads)

    def build_all(self, sites: Mapping[str, Site]) -> dict[str, WeightAdapter]:
        """Build an adapter for each site, by name; override it if adapters share something."""
        built = {}
        for name, site in sites.items():
            with self.seeded_init(name):
                built[name] = self.build(site)
        return built

    def plan(self, model: nn.Module) -> Plan:
        plan = self.start_plan(model)
        heads = [*plan.train_modules]
        sites, left_out = self.find(model, heads)
        check_stored(sites.values())
        sites = self._without_small(sites, plan)
        if (empty := next(filter(None, map(_empty, sites.values())), None)) is not None:
            raise TargetError(f"{empty}, so it has nothing to adapt. Exclude it")
        for head in left_out:
            if head not in heads:
                how = how_head_was_found(model, weight_sites(model))
                plan.notes.append(
                    f"{head} (the output head{how and f', {how}'}) stays frozen; name it in targets or trainable "
                    "to train it"
                )
        if "all-linear" in as_patterns(self.targets, "targets"):
            plan.notes += left_out_notes(model)
            plan.notes += _not_reached(model, [*sites, *left_out, *heads, *plan.train])
        built: dict[str, dict[str, WeightAdapter]] = {}
        for name, adapter_at in self.build_all(sites).items():
            built.setdefault(sites[name].host, {})[name] = adapter_at
        for host, adapters in built.items():
            module = model.get_submodule(host)
            kind = original_class(module).__name__
            shapes = " + ".join("x".join(map(str, sites[name].shape)) for name in adapters)
            what = f"{self.describe(next(iter(adapters.values())))} on {kind} {shapes}"
            whole = len(adapters) == 1 and sites[next(iter(adapters))].parameter == "weight"
            adapter: Adapter = next(iter(adapters.values()))
            if not whole:
                adapter = WeightGroup({a.parameter: a for a in adapters.values()})
            shown = host if len(adapters) > 1 else next(iter(adapters))
            plan.attach.append(Attachment(host, shown, adapter, what))
        return plan

    def describe(self, adapter: WeightAdapter) -> str:
        """Describe one adapter in a few words, for the report's table."""
        return type(self).__name__

    def adapters_by_weight(self, model: nn.Module) -> dict[str, WeightAdapter]:
        """This method's adapters in ``model``, by the name of the adapted weight."""
        found = {host: cast(Adapter, stack[self.name]) for host, stack in stacks(model).items() if self.name in stack}
        return {
            weight_name(host, parameter, bare=layer_kind(model.get_submodule(host), part.layout) == "Parameter"): part
            for host, adapter in found.items()
            for parameter, part in adapter.weights().items()
        }


def _empty(site: Site) -> str | None:
    """Why the weight at ``site`` holds no numbers; None if it does."""
    return (
        None if all(site.shape) else f"{site.name!r} has a weight of {'x'.join(map(str, site.shape))}, without elements"
    )


def _not_reached(model: nn.Module, reached: list[str]) -> list[str]:
    """A note with the share of parameters outside the ``reached`` layers, by class; no note below 1 %."""
    inside = in_frozen_part(model)
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    total = 0
    for name, module in base_modules(model):
        for parameter, (identity, size) in parameter_sizes(module).items():
            if identity in seen:
                continue
            seen.add(identity)
            total += size
            key = join(name, parameter)
            if not inside(key) and not is_within(key, *reached):
                kind = original_class(module).__name__
                sizes[kind] = sizes.get(kind, 0) + size
    shares = {kind: 100 * size / max(total, 1) for kind, size in sorted(sizes.items(), key=lambda item: -item[1])}
    if sum(shares.values()) < 1:
        return []
    each = ", ".join(f"{kind} {share:.3g} %" for kind, share in shares.items() if share >= 0.1)
    return [f"targets='all-linear' does not reach {sum(shares.values()):.3g} % of the parameters: {each}"]


def above_both_sides(r: int, argument: str, site: Site) -> str | None:
    """An explanation if rank ``r`` is larger than both sides of the matrix at ``site``; otherwise None."""
    smaller, larger = sorted(site.shape[-2:])
    if r <= larger:
        return None
    shape = "x".join(map(str, site.shape))
    return f"{argument}={r} is above both sides of {site.name!r} ({shape}), whose rank is at most {smaller}"


def check_low_rank(method: str, r: int, argument: str, dropout: float, site: Site) -> None:
    """Check that the weight at ``site`` supports a rank and a dropout.

    Raises:
        ValueError: if the rank is above both sides of the matrix, or dropout is set for a weight that is not called
            with activations.
    """
    if (problem := above_both_sides(r, argument, site)) is not None:
        raise ValueError(f"{problem}. Lower {argument}, or exclude the layer and add a second {method} for it")
    check_dropout(method, dropout, site)


def check_dropout(method: str, dropout: float, site: Site) -> None:
    """Check that ``dropout`` is 0 if a module reads the weight at ``site`` without calling its layer.

    Raises:
        ValueError: if dropout cannot be applied, because the layer gets no activations.
    """
    if dropout and not site.layout.has_activation:
        raise ValueError(
            f"dropout={dropout} is not supported on {site.name!r}: its module reads the weight instead of calling a "
            f"layer. Set dropout=0, or exclude it and add a second {method} with dropout=0 for it"
        )


def check_bias(site: Site) -> None:
    """Check that the bias of the weight at ``site`` can change together with the weight.

    Raises:
        ValueError: if the bias is shared with other weights.
    """
    packed = site.parameter.endswith("_proj_weight") and site.parameter != "in_proj_weight"
    if packed and site.module._parameters.get("in_proj_bias") is not None:
        raise ValueError(
            f"{site.name!r} shares the bias of its attention with the other projections, so the bias cannot change "
            "with this weight alone: exclude it, or name the attention's out_proj"
        )
