"""Measure gradients, steps and updates of each adapter of a model in a fit.

For weights whose update is a product dW = B A of rank k, both ||dW|| and the singular values s of dW follow from the
k x k matrices A A^T and B^T B, so dW is never computed:

    ||B A||_F^2 = sum((B^T B) * (A A^T)),    s^2 = eigenvalues of (A A^T)^(1/2) (B^T B) (A A^T)^(1/2)

The effective rank is exp(-sum_i p_i log p_i) with p = s / sum(s): Roy and Vetterli 2007, "The effective rank: A measure
of effective dimensionality".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter, WeightAdapter
from lightning_peft.core.adapters.effective_weights import base_tensor
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.injection.low_rank_factors import evaluating
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.trainer.logs import keys

__all__ = ["Norms", "Updates", "effective_ranks"]

#: forming A A^T and B^T B may cost as much as the layer's own forward of this many tokens
_TOKENS = 64


class Norms:
    """The gradient and step norms of each adapter, for the optimizer steps that are measured.

    Args:
        model: the module that trains. Its adapters are looked up once, because walking through all modules takes longer
            than the measurement.
    """

    def __init__(self, model: nn.Module) -> None:
        record, root = injection_state(model), injected_module(model)
        self._adapters: dict[str, list[nn.Parameter]] = {}
        self._base: dict[str, list[nn.Parameter]] = {}
        for _, host in hosts(model):
            for name, adapter in cast(nn.ModuleDict, host.adapters).items():
                self._adapters.setdefault(name, []).extend(adapter.parameters())
        for name, trained in record.trained_base.items() if record is not None else ():
            own = {id(p) for parameters in self._adapters.values() for p in parameters}
            modules = [root.get_submodule(module) for module in trained.modules]
            found = [*(p for m in modules for p in m.parameters()), *map(root.get_parameter, trained.parameters)]
            self._base[name] = [p for p in found if id(p) not in own]
        self._gradients: dict[tuple[str, int], Tensor] = {}
        self._before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients, and copy the adapters, before one step of ``optimizer``."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for groups, key in ((self._adapters, keys.GRADIENT), (self._base, keys.BASE_GRADIENT)):
            for name, parameters in groups.items():
                moving = [p for p in parameters if id(p) in stepped and p.grad is not None]
                if moving:
                    self._gradients[keys.of_adapter(name, key), id(optimizer)] = _norm(p.grad for p in moving)  # type: ignore[misc]
                if moving and key is keys.GRADIENT:
                    known = {id(p) for p, _ in self._before.get(name, ())}
                    new = [(p, p.detach().clone()) for p in moving if id(p) not in known]
                    self._before.setdefault(name, []).extend(new)

    @torch.no_grad()
    def after_steps(self) -> dict[str, float]:
        """Return the norms of the steps since the last call, by key, and forget them."""
        parts: dict[str, list[Tensor]] = {}
        for (key, _), norm in self._gradients.items():
            parts.setdefault(key, []).append(norm)
        for name, pairs in self._before.items():
            parts[keys.of_adapter(name, keys.STEP)] = [_norm(p.detach() - before for p, before in pairs)]
        self._gradients, self._before = {}, {}
        if not parts:
            return {}
        device = next(iter(parts.values()))[0].device
        norms = [torch.stack([v.to(device) for v in values]).norm() for values in parts.values()]
        return dict(zip(parts, torch.stack(norms).tolist()))  # one synchronisation with a GPU


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm over all elements of ``tensors``, in float32."""
    parts = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    return torch.nn.utils.get_total_norm([torch.view_as_real(t) if t.is_complex() else t for t in parts]).float()


class Updates:
    """The relative update and the effective rank of each adapter whose updates are low-rank products."""

    def __init__(self, model: nn.Module) -> None:
        self._parts: dict[str, list[tuple[nn.Module, WeightAdapter]]] = {}
        for _, host in hosts(model):
            for name, adapter in cast(nn.ModuleDict, host.adapters).items():
                weights = cast(Adapter, adapter).weights().values()
                self._parts.setdefault(name, []).extend((host, part) for part in weights)
        self._squares: dict[str, float] = {}  # of the base's weights, which are frozen

    @torch.no_grad()
    def measure(self, norms: bool = True, ranks: bool = True) -> dict[str, float]:
        """Return the values by key; adapters with a different form of update are left out.

        Args:
            norms: return the relative updates.
            ranks: return the effective ranks.
        """
        found: dict[str, float] = {}
        for name, parts in self._parts.items():
            grams = list(_grams(part for _, part in parts))
            if not parts or len(grams) < len(parts):
                continue
            square, spectra = 0.0, []
            for a, b in _stacked(grams):
                square += float((a * b).sum().clamp_min(0))
                spectra += effective_ranks(a, b).tolist() if ranks else []
            if norms and name not in self._squares:
                self._squares[name] = sum(_square(host, part.parameter) for host, part in parts)
            if norms and self._squares[name]:
                found[keys.of_adapter(name, keys.UPDATE)] = (square / self._squares[name]) ** 0.5
            if ranks:
                found[keys.of_adapter(name, keys.EFFECTIVE_RANK)] = sum(spectra) / len(spectra)
        return found


def _grams(parts: Iterable[WeightAdapter]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A A^T and B^T B (n, k, k) of each update that is a low-rank product and cheap to measure."""
    for part in parts:
        with evaluating(part):
            pair = part.low_rank()
        if pair is None:
            continue
        a, b = (factor.detach().float() for factor in pair)
        k, rows, columns = a.shape[-2], b.shape[-2], a.shape[-1]
        if k * k * (rows + columns) <= _TOKENS * rows * columns:
            yield (a @ a.mT).reshape(-1, k, k), (b.mT @ b).reshape(-1, k, k)


def _stacked(grams: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack the matrices of equal size, in float64 on the CPU, in one transfer each."""
    sizes: dict[tuple[int, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for a, b in grams:
        sizes.setdefault((a.shape[-1], a.device), []).append((a, b))
    for pairs in sizes.values():
        a, b = torch.stack([torch.cat(side) for side in zip(*pairs)]).cpu().double()
        yield a, b


def effective_ranks(a: Tensor, b: Tensor) -> Tensor:
    """Return the effective rank (n,) of each product B A, given A A^T and B^T B (n, k, k); 0 for a product of 0."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    sigma = torch.linalg.eigvalsh(root.mT @ b @ root).clamp_min(0).sqrt()
    total = sigma.sum(-1, keepdim=True)
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def _square(host: nn.Module, name: str) -> float:
    """The squared norm of a weight of the base."""
    weight = cast(Tensor, base_tensor(host, name)).detach()
    return float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
