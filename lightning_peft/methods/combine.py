"""Adapter arithmetic: combine the weight changes of several adapters into a new LoRA.

Every weight adapter changes its matrix from W to transform(W). The methods below combine the differences
D_i = transform_i(W) - W of each weight, with one weight w_i per adapter; top, random and sign act on matrix entries:

| how | D of the result |
|---|---|
| linear, cat, svd | sum_i w_i D_i |
| magnitude_prune | sum_i w_i top(D_i), the share ``density`` of entries of largest magnitude |
| dare_linear | sum_i w_i random(D_i) / density, entries kept with probability ``density`` |
| ties | sum_i w_i T_i m_i / sum_i m_i, T_i = top(D_i), m_i = 1 where T_i has the sign of sum_i T_i |
| dare_ties | the same of T_i = random(D_i) / density |

Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv:2212.04089. TIES: Yadav et al. 2023, "TIES-Merging:
Resolving Interference When Merging Models", arXiv:2306.01708. DARE: Yu et al. 2023, "Language Models are Super Mario",
arXiv:2311.03099. Hugging Face PEFT's ``add_weighted_adapter`` does the same under ``svd``, ``ties_svd``,
``dare_linear_svd`` and so on. Its ``linear`` and ``ties`` average the factors A and B themselves. That is a different
result (the product of two sums has cross terms), and is not offered here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.base import BIASES, Adapter, WeightAdapter
from lightning_peft.core.adapters.effective_weights import base_tensor
from lightning_peft.core.adapters.lookup import adapter_names, check_known, check_unmerged, stacks
from lightning_peft.core.injection.apply import install
from lightning_peft.core.injection.low_rank_factors import (
    Factors,
    LowRankReport,
    evaluating,
    low_rank_factors,
    weight_delta,
)
from lightning_peft.core.injection.overrides import parameter_overrides
from lightning_peft.core.injection.remove import check_deletable, uninstall
from lightning_peft.core.names import check_name, join
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.state.plan import Attachment, Method, Plan
from lightning_peft.core.switching.active import deactivate
from lightning_peft.core.targeting.computed_weights import steady_tensor
from lightning_peft.core.targeting.patterns import exactly
from lightning_peft.core.targeting.sites import weight_sites
from lightning_peft.methods.families.arguments import one_of, positive_int
from lightning_peft.methods.lora import LoRA, lora_parts

__all__ = ["combine", "mix", "to_lora"]

How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
_SUMS = ("linear", "cat", "svd")
_HOWS = (*_SUMS, "ties", "dare_linear", "dare_ties", "magnitude_prune")


@torch.no_grad()
def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    name: str = "combined",
    how: How = "linear",
    r: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
) -> LowRankReport:
    """Combine adapters into a new one: a LoRA, added to ``model`` frozen and inactive until ``lp.set_active``.

    The adapters may come from different weight methods. An adapter counts as a zero change of every weight that it does
    not adapt. If all are low-rank products (``low_rank()`` returns factors), a weighted sum is exact, because their
    factors are concatenated. Every other result is decomposed by SVD, exactly unless ``r`` or ``energy`` truncates it.

    A loaded adapter may override heads, biases and norm statistics of the base. ``"linear"``, ``"cat"`` and ``"svd"``
    interpolate these too: base + sum_i w_i (override_i - base). Base parameters that a method trained in place count as
    part of the base. If the adapters consist of overrides only (for example of :class:`lightning_peft.BitFit`), the
    result is another adapter of the first one's method.

    Args:
        model: the adapted model; only the new adapter is added.
        names: names of the adapters, at least one.
        weights: one factor per adapter, positive or negative; None weights them equally, with a sum of 1.
        name: name of the new adapter.
        how: see the table in :mod:`lightning_peft.methods.combine`. ``"cat"`` is ``"linear"``, but raises an error if
            the sum is not exactly low-rank; ``"svd"`` truncates to the largest rank among the adapters by default.
        r: maximum rank of the result.
        energy: minimum fraction of the squared norm to keep, in (0, 1]. If neither ``r`` nor ``energy`` is set, the
            result is exact.
        density: fraction of entries to keep, in (0, 1]; only for the methods that select entries.
        seed: seed for DARE's random selection.

    Returns:
        The ranks of the result, and the error of the truncation.

    Raises:
        ValueError: if an adapter does not exist or is merged; if it does not change weights or changes more than
            weights (activation and sequence methods, changed biases); if overrides differ in shape; if arguments
            contradict each other. The model is then unchanged.

    Example::

        lp.combine(model, ["english", "math"], weights=[1.0, -0.5], name="mix")
        lp.set_active(model, "mix")
    """
    shares = [1 / max(1, len(names))] * len(names) if weights is None else list(weights)
    check_name(name)
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter named {name!r}: choose another name")
    _check(model, names, shares, how, r, energy, density)
    root = injected_module(model)
    combined = _combined(root, dict(zip(names, shares)), how, r, energy, density, seed)
    _install_combined(root, name, combined, like=names[0])
    deactivate(root, name)
    return combined.report


@torch.no_grad()
def to_lora(
    model: nn.Module, name: str, r: int | None = None, energy: float | None = None, new_name: str | None = None
) -> LowRankReport:
    """Convert a weight adapter of any method to a plain LoRA, which all tools that read LoRA support.

    Low-rank products stay exact; a LoRA initialised from the weight (such as PiSSA) gets twice its rank. Other changes
    are decomposed by SVD, exactly (at the rank this requires) or truncated by ``r`` or ``energy``.

    Args:
        model: the adapted model; changed in place.
        name: name of the adapter.
        r: maximum rank of the result.
        energy: minimum fraction of the squared norm to keep, in (0, 1].
        new_name: keep the adapter, and add the LoRA under this name, frozen and inactive. By default the LoRA replaces
            the adapter and takes over its name and whether it trains.

    Returns:
        The ranks of the result, and the error of the truncation.

    Raises:
        ValueError: if :func:`combine` would raise it, or if a Trainer is training the adapter, because its optimizer
            would keep the replaced parameters.

    Example::

        report = lp.to_lora(model, "loha", energy=0.99)
        print(report.error)  # of the change, in the Frobenius norm
    """
    _check(model, [name], [1.0], "linear", r, energy, None)
    root = injected_module(model)
    if not _changes(root, [name]):
        raise ValueError(f"{name!r} does not change a matrix, so it cannot be converted to LoRA")
    if new_name is not None:
        return combine(model, [name], [1.0], new_name, r=r, energy=energy)
    check_deletable(model, name)
    combined = _combined(root, {name: 1.0}, "linear", r, energy, None, 0)
    before = {host: (list(stack), stack.active) for host, stack in stacks(root).items() if name in stack}
    trains = any(p.requires_grad for s in stacks(root).values() if name in s for p in cast(Any, s[name]).parameters())
    record = injection_state(model)
    own = record.trained_base.get(name) if record is not None else None
    uninstall(root, name)
    _install_combined(root, name, combined, trains=trains)
    if (record := injection_state(model)) is not None and own is not None:
        record.trained_base[name] = own
    for host, stack in stacks(root).items():
        if name in stack:
            order, stack.active = before[host]
            for n in order:
                stack._modules[n] = stack._modules.pop(n)
            stack.refresh()
    return combined.report


def _check(
    model: nn.Module,
    names: Sequence[str],
    shares: Sequence[float],
    how: str,
    r: int | None,
    energy: float | None,
    density: float | None,
) -> None:
    one_of(*_HOWS).require("how", how)
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"names must be a list of different adapters, got {names!r}")
    check_known(model, *names)
    if len(shares) != len(names) or not all(isinstance(w, int | float) and math.isfinite(w) for w in shares):
        raise ValueError(f"weights must be a finite number for each of {list(names)}, got {list(shares)!r}")
    check_unmerged(model)
    if r is not None and energy is not None:
        raise ValueError(f"r={r} and energy={energy} both set the rank: remove one of them")
    if r is not None:
        positive_int.require("r", r)
    if how == "cat" and (r is not None or energy is not None):
        raise ValueError("how='cat' keeps the factors unchanged, so r and energy have no effect: use how='svd' instead")
    for argument, value, wanted in (("energy", energy, None), ("density", density, how not in _SUMS)):
        if wanted is not None and (value is not None) != wanted:
            raise ValueError(f"how={how!r} {'needs' if wanted else 'does not use'} {argument}, got {value!r}")
        if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
            raise ValueError(f"{argument} must be a fraction in (0, 1], got {value!r}")


@dataclass
class _Combined:
    """The parts of a new LoRA: factors by weight, overrides by full name, and the error of the factors."""

    factors: dict[str, Factors] = field(default_factory=dict)
    overrides: dict[str, Tensor] = field(default_factory=dict)
    report: LowRankReport = field(default_factory=LowRankReport)


def _combined(
    root: nn.Module,
    shares: Mapping[str, float],
    how: str,
    r: int | None,
    energy: float | None,
    density: float | None,
    seed: int,
) -> _Combined:
    """Compute the result of :func:`combine` without changing the model."""
    changes = _changes(root, shares)
    combined = _Combined(overrides=_interpolated(root, shares))
    if combined.overrides and how not in _SUMS:
        raise ValueError(
            f"the adapters override base parameters ({list(combined.overrides)[:3]}), which how={how!r} cannot "
            "combine: use how='linear' instead"
        )
    generator = torch.Generator().manual_seed(seed)
    for site, (weight, parts) in changes.items():
        weights, factors = [shares[n] for n in parts], [_factors(part) for part in parts.values()]
        pairs = [f for f in factors if f is not None]
        exact = len(pairs) == len(parts)
        if how == "cat" and not exact:
            raise ValueError(
                f"how='cat' needs low-rank adapters, but one at {site!r} is not low-rank: use how='linear' instead"
            )
        cut = r
        if how == "svd" and exact and r is None and energy is None:
            cut = max(a.shape[-2] for a, _ in pairs)
        mixed: Factors | Tensor
        if how in _SUMS and exact:
            left = torch.cat([w * a for w, (a, _) in zip(weights, pairs)], -2)
            mixed = left, torch.cat([b for _, b in pairs], -1)
        else:
            tasks = torch.stack([weight_delta(part, weight) for part in parts.values()])
            mixed = mix(tasks, weights, how, density, generator)
        combined.factors[site], combined.report.errors[site], combined.report.norms[site] = low_rank_factors(
            mixed, cut, energy
        )
        combined.report.ranks[site] = combined.factors[site][0].shape[-2]
    return combined


def mix(tasks: Tensor, weights: Sequence[float], how: str, density: float | None, generator: torch.Generator) -> Tensor:
    """Combine the changes of one matrix as in the table of this module.

    Args:
        tasks: the changes, (number, ..., out, in).
        weights: one factor per change.
        how, density: see :func:`combine`.
        generator: CPU generator for DARE.
    """
    if how not in _SUMS:
        assert density is not None
        drop = _random if how.startswith("dare") else _largest
        tasks = torch.stack([task * drop(task, density, generator) for task in tasks])
    weighted = tasks * tasks.new_tensor(weights).view(-1, *[1] * (tasks.ndim - 1))
    if not how.endswith("ties"):
        return weighted.sum(0)
    agree = tasks.sign() == torch.where(tasks.sum(0) >= 0, 1.0, -1.0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def _largest(task: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.zeros_like(task).flatten()
    kept[task.abs().flatten().topk(int(density * task.numel())).indices] = 1
    return kept.view_as(task)


def _random(task: Tensor, density: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(task.shape, generator=generator) < density).to(task) / density


def _factors(part: WeightAdapter) -> Factors | None:
    with evaluating(part):
        found = part.low_rank()
    if found is None:
        return None
    a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in found)
    return a, b


def _changes(root: nn.Module, names: Collection[str]) -> dict[str, tuple[Tensor, dict[str, WeightAdapter]]]:
    """The adapted weights by name, each with its stored value and its adapters by name.

    Raises:
        ValueError: if an adapter does not change a weight, or changes more than a weight.
    """
    sites = {(site.host, site.parameter): site.name for site in weight_sites(root).values()}
    found: dict[str, tuple[Tensor, dict[str, WeightAdapter]]] = {}
    for host_name, stack in stacks(root).items():
        host = root.get_submodule(host_name)
        for name in (n for n in names if n in stack):
            for adapter in cast(Adapter, stack[name]).components():
                place = repr(host_name) if host_name else "the model itself"
                where = f"{name!r} at {place} ({type(adapter).__name__})"
                if not (adapter.weights() or adapter.overrides() or adapter.is_passthrough):
                    raise ValueError(f"{where} does not change weights, so it cannot be combined or converted to LoRA")
                for parameter, part in adapter.weights().items():
                    bias = steady_tensor(host, BIASES[parameter]) if parameter in BIASES else None
                    if (host_name, parameter) not in sites or part.transform_bias(bias) is not bias:
                        raise ValueError(
                            f"{where} changes more than a matrix (a bias or a norm), so it cannot be combined or "
                            "converted to LoRA"
                        )
                    weight = cast(Tensor, base_tensor(host, parameter))
                    found.setdefault(sites[host_name, parameter], (weight, {}))[1][name] = part
    return {site: (weight, {n: parts[n] for n in names if n in parts}) for site, (weight, parts) in found.items()}


def _interpolated(root: nn.Module, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """The interpolated overrides of base parameters, by full name."""
    found: dict[str, Tensor] = {}
    alone = list(shares.values()) == [1]
    for host_name, stack in stacks(root).items():
        for name, share in ((n, w) for n, w in shares.items() if n in stack):
            for local, copy in (
                (k, c) for part in cast(Adapter, stack[name]).components() for k, c in part.overrides().items()
            ):
                full = join(host_name, local)
                base = cast(Tensor, steady_tensor(root.get_submodule(host_name), local)).detach()
                if alone:
                    found[full] = copy.detach()
                elif copy.shape != base.shape:
                    shapes = f"{tuple(copy.shape)} and the base's has shape {tuple(base.shape)}"
                    raise ValueError(f"{full} of {name!r} has shape {shapes}, so they cannot be interpolated")
                elif copy.is_floating_point():
                    found[full] = found.get(full, base) + share * (copy - base)
    return found


def _install_combined(root: nn.Module, name: str, combined: _Combined, like: str = "", trains: bool = False) -> None:
    """Install a LoRA with these factors and overrides; without factors, an adapter of the same method as ``like``."""
    record = injection_state(root)
    method: Method
    if combined.factors:
        method, plan = _lora(root, name, combined.factors, trains)
    elif combined.overrides and record is not None:
        source: Any = record.methods[like]
        method, plan = type(source)(**{**source.config(), "name": name}), Plan()
    else:
        raise ValueError(f"{like!r} does not change anything in this model, so there is nothing to combine")
    for host, adapter in parameter_overrides(root, combined.overrides, trains).items():
        plan.attach.append(Attachment(host, host, adapter, f"own {', '.join(adapter.stored_as)}"))
    install(root, {name: (method, plan)})


def _lora(root: nn.Module, name: str, factors: dict[str, Factors], trains: bool) -> tuple[LoRA, Plan]:
    """A LoRA of scale 1 with these factors."""
    ranks = {site: a.shape[-2] for site, (a, _) in factors.items()}
    most = max(ranks.values())
    other = {exactly(site): rank for site, rank in ranks.items() if rank != most}
    method = LoRA(
        r=most,
        alpha=most,
        targets=list(map(exactly, factors)),
        name=name,
        rank_pattern=other,
        alpha_pattern=dict(other),
    )
    plan = method.plan(root)
    for adapter in (a.adapter for a in plan.attach):
        for part in lora_parts(adapter):
            for parameter, value in zip((part.lora_A, part.lora_B), factors[part.site_name]):
                parameter.data = value.detach().clone().to(torch.promote_types(value.dtype, torch.float32))
        adapter.requires_grad_(trains)
    return method, plan
