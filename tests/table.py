"""The table: which methods are held to which invariants on which layer kinds, and every hole with its reason.

A new method adds one row. ``tests/methods/test_table.py`` holds the invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from tests.kinds import KINDS, Kind


@dataclass(frozen=True)
class Row:
    """One method, or one way to set it.

    Attributes:
        make: the method for a kind; takes ``name`` and other options.
        count: the number of trainable parameters that the paper's formula gives, for a kind and its plain model.
        identity: whether the adapted model starts as its base.
        mergeable: whether the change can be folded into the weights.
        additive: whether it is a sum, which may change places with others.
    """

    make: Callable[..., lp.PEFTMethod]
    count: Callable[[Kind, nn.Module], int]
    identity: bool = True
    mergeable: bool = True
    additive: bool = True


class Rescale(lp.WeightMethod):
    """A method of a user's own: each row of the matrix times a number. It has no path on activations."""

    def build(self, site: Any) -> lp.WeightAdapter:
        return RescaleAdapter(site)


class RescaleAdapter(lp.WeightAdapter):
    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(0.01 * torch.rand(*site.shape[:-1], 1))

    def transform(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.gain)


def low_rank(r: int, first: int | None = None) -> Callable[[Kind, nn.Module], int]:
    """r (in + out) for each matrix; ``first`` is the rank of the first one where it differs."""

    def count(kind: Kind, model: nn.Module) -> int:
        ranks = [first or r] + [r] * (len(kind.matrices) - 1)
        return sum(rank * prod(batch) * (o + i) for rank, (*batch, o, i) in zip(ranks, kind.matrices.values()))

    return count


def all_biases(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))


def lora(**fixed: Any) -> Callable[..., lp.PEFTMethod]:
    return lambda kind, **options: lp.LoRA(**{"r": 2, "alpha": 4, "targets": kind.targets, **fixed, **options})


def lora_patterns(kind: Kind, **options: Any) -> lp.PEFTMethod:
    first = f"re:{kind.first}"
    return lora(rank_pattern={first: 3}, alpha_pattern={first: 5})(kind, **options)


def weight(method: Callable[..., lp.PEFTMethod], **fixed: Any) -> Callable[..., lp.PEFTMethod]:
    return lambda kind, **options: method(**{"targets": kind.targets, **fixed, **options})


def per_row(kind: Kind, model: nn.Module) -> int:
    return sum(prod(rows) for *rows, _ in kind.matrices.values())


def kronecker(r: int) -> Callable[[Kind, nn.Module], int]:
    """l m + k n kernel, or l m + r (k + n kernel) where r is below half of max(k, n)."""

    def near_root(n: int) -> tuple[int, int]:
        first = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
        return first, n // first

    def count(kind: Kind, model: nn.Module) -> int:
        total = 0
        for name, (*batch, o, i) in kind.matrices.items():
            size = prod(getattr(_module(model, name), "kernel_size", ()))
            (l, k), (m, n) = near_root(o), near_root(i // size)  # noqa: E741
            second = k * n * size if r >= max(k, n) / 2 else r * (k + n * size)
            total += prod(batch) * (l * m + second)
        return total

    return count


def rotations(b: int) -> Callable[[Kind, nn.Module], int]:
    """d (d - 1) / 2 for each block of the columns (an embedding's rows), d the divisor nearest to ``b``."""

    def count(kind: Kind, model: nn.Module) -> int:
        total = 0
        for name, (*batch, o, i) in kind.matrices.items():
            side = o if isinstance(_module(model, name), nn.Embedding) else i
            divisor = min((d for d in range(2, side + 1) if side % d == 0), key=lambda d: (abs(d - b), d))
            total += prod(batch) * side // divisor * divisor * (divisor - 1) // 2
        return total

    return count


def _module(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


METHODS: dict[str, Row] = {
    "lora": Row(lora(), low_rank(2)),
    "lora_rs": Row(lora(use_rslora=True, r=3), low_rank(3)),
    "lora_patterns": Row(lora_patterns, low_rank(2, first=3)),
    "lora_gaussian": Row(lora(init="gaussian"), low_rank(2)),
    "lora_dropout": Row(lora(dropout=0.3), low_rank(2)),
    "lora_bias": Row(lora(bias="all"), lambda kind, model: low_rank(2)(kind, model) + all_biases(model)),
    "lora_pissa": Row(lora(init="pissa"), low_rank(2)),
    "lora_olora": Row(lora(init="olora"), low_rank(2)),
    "dora": Row(
        weight(lp.DoRA, r=2, alpha=4),
        lambda kind, model: low_rank(2)(kind, model) + per_row(kind, model),
        additive=False,
    ),
    "vera": Row(
        weight(lp.VeRA, r=4),
        lambda kind, model: sum(prod(batch) * (4 + o) for *batch, o, _ in kind.matrices.values()),
    ),
    "loha": Row(weight(lp.LoHa, r=2), lambda kind, model: 2 * low_rank(2)(kind, model)),
    "lokr": Row(weight(lp.LoKr, r=1), kronecker(1)),
    "oft": Row(weight(lp.OFT, block_size=3), rotations(3), additive=False),
    "rescale": Row(
        lambda kind, **options: Rescale(targets=kind.targets, **options),
        lambda kind, model: sum(prod(rows) for *rows, _ in kind.matrices.values()),
        identity=False,
        additive=False,
    ),
}

ANY = "*"

_READS = "dropout acts on a layer's input; here the module reads the weight itself, and LoRA says so"
_TIED = "one tensor under two names: a merge into one would change the other, and is refused"
_NORMS = "the norm layers' biases train, so these layers are not frozen: their statistics move, and are saved"
_FIXED = "its start follows from the weights or is a constant: there is no randomness to seed"
_IDS = "reentrant checkpointing gives gradients only where an input takes one; token ids take none"

#: (method, kind, invariant) -> why it is not held there; what refuses with an error is tested to do so
HOLES: dict[tuple[str, str, str], str] = {
    ("lora_dropout", "mha", ANY): _READS,
    ("lora_dropout", "mha_batch_first", ANY): _READS,
    ("lora_dropout", "mha_kdim", ANY): _READS,
    ("lora_dropout", "encoder", ANY): _READS,
    ("lora_dropout", "experts", ANY): _READS,
    ("lora_dropout", "scaled", ANY): _READS,
    (ANY, "tied", "merge"): _TIED,
    (ANY, "tied", "merge_float64"): _TIED,
    (ANY, "tied", "merge_two"): _TIED,
    (ANY, "tied", "merge_unload"): _TIED,
    **{(ANY, kind, "checkpointing_reentrant"): _IDS for kind in ("embedding", "tied", "scaled", "llama", "gpt2")},
    **{(method, ANY, "seeded"): _FIXED for method in ("lora_pissa", "lora_olora", "vera", "oft")},
    ("lora_dropout", ANY, "modes"): "random while training",
    ("lora_bias", "resnet", "modes"): _NORMS,
    ("lora_bias", "resnet", "training"): _NORMS,
    (ANY, "llama", "merge_float64"): "its RMSNorm and rotary embedding compute in float32 whatever the model's type",
}


def hole(method: str, kind: str, invariant: str) -> str | None:
    """Why ``invariant`` is not held for ``method`` on ``kind``, or None where it is."""
    for key in [(m, k, i) for m in (method, ANY) for k in (kind, ANY) for i in (invariant, ANY)]:
        if key in HOLES:
            return HOLES[key]
    row = METHODS[method]
    if not row.mergeable and invariant.startswith("merge"):
        return "no function of a weight"
    return "starts elsewhere than its base" if invariant == "identity" and not row.identity else None


def cells(invariant: str, methods: list[str] | None = None, kinds: list[str] | None = None) -> Iterator[Any]:
    for method in methods or METHODS:
        for kind in kinds or KINDS:
            if hole(method, kind, invariant) is None:
                yield pytest.param(METHODS[method], KINDS[kind], id=f"{method}-{kind}")


def over_table(invariant: str, methods: list[str] | None = None, kinds: list[str] | None = None) -> Any:
    """Run a test over all cells of the table that are held to ``invariant``."""
    return pytest.mark.parametrize(("row", "kind"), list(cells(invariant, methods, kinds)))
