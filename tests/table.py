"""The table of tests: which invariant is tested for which method on which layer kind, and a reason for every hole.

A new method adds one row. ``tests/methods/test_table.py`` defines the invariants.

A hole is a cell that no test runs: ``HOLES`` and :func:`hole` say why the invariant cannot hold there. A cell of
``REFUSED`` is tested instead to raise an error, with a message that says why.
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
from tests.holes import ANY, HOLES, REFUSED
from tests.kinds import KINDS, Kind


@dataclass(frozen=True)
class Row:
    """One method, or one configuration of it.

    Attributes:
        make: returns the method for a kind; takes ``name`` and other options.
        count: the number of trainable parameters that the paper's formula gives, for a kind and its plain model.
        identity: whether the adapted model starts as its base.
        mergeable: whether the change can be merged into the weights.
        additive: whether the change is a sum, so that the order of two adapters does not matter.
        selects: whether the method trains parameters of the base instead of adding adapters.
        kinds: the kinds to test, for a variant of another row; by default all.
    """

    make: Callable[..., lp.PEFTMethod]
    count: Callable[[Kind, nn.Module], int]
    identity: bool = True
    mergeable: bool = True
    additive: bool = True
    selects: bool = False
    kinds: tuple[str, ...] = tuple(KINDS)


class Rescale(lp.WeightMethod):
    """A user-defined method: multiplies each row of the matrix by a number. It has no path on activations."""

    def build(self, site: Any) -> lp.WeightAdapter:
        return RescaleAdapter(site)


class RescaleAdapter(lp.WeightAdapter):
    def __init__(self, site: Any) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(0.01 * torch.rand(*site.shape[:-1], 1))

    def transform(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.gain)


def low_rank(r: int, first: int | None = None) -> Callable[[Kind, nn.Module], int]:
    """r (in + out) for each matrix; ``first`` is the rank of the first matrix if it differs."""

    def count(kind: Kind, model: nn.Module) -> int:
        ranks = [first or r] + [r] * (len(kind.matrices) - 1)
        return sum(rank * prod(batch) * (o + i) for rank, (*batch, o, i) in zip(ranks, kind.matrices.values()))

    return count


def all_biases(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "bias" in name.rpartition(".")[2])


def lora(**fixed: Any) -> Callable[..., lp.PEFTMethod]:
    return lambda kind, **options: lp.LoRA(**{"r": 2, "alpha": 4, "targets": kind.targets, **fixed, **options})


def lora_patterns(kind: Kind, **options: Any) -> lp.PEFTMethod:
    first = f"re:{kind.first}"
    return lora(rank_pattern={first: 3}, alpha_pattern={first: 5})(kind, **options)


def lora_half(kind: Kind, model: nn.Module) -> int:
    """r out for each matrix; r vocabulary for an embedding, whose other factor is frozen."""
    looked_up = {name for name in kind.matrices if isinstance(_module(model, name), nn.Embedding)}
    return sum(2 * prod(b) * (i if name in looked_up else o) for name, (*b, o, i) in kind.matrices.items())


def weight(method: Callable[..., lp.PEFTMethod], **fixed: Any) -> Callable[..., lp.PEFTMethod]:
    return lambda kind, **options: method(**{"targets": kind.targets, **fixed, **options})


def triplets(kind: Kind, model: nn.Module) -> int:
    """r (in + out + 1) for each matrix."""
    return low_rank(2)(kind, model) + sum(2 * prod(batch) for *batch, _, _ in kind.matrices.values())


def per_row(kind: Kind, model: nn.Module) -> int:
    return sum(prod(rows) for *rows, _ in kind.matrices.values())


def per_input(kind: Kind, model: nn.Module) -> int:
    """One number for each input of a layer; for a convolution, for each input channel, whatever the kernel."""
    inputs = {name: getattr(_module(model, name), "in_channels", shape[-1]) for name, shape in kind.matrices.items()}
    return sum(prod(kind.matrices[name][:-2]) * width for name, width in inputs.items())


def bottlenecks(m: int) -> Callable[[Kind, nn.Module], int]:
    """2 m d + d + m for each layer that returns d features; an attention or a recurrent layer counts as one."""

    def count(kind: Kind, model: nn.Module) -> int:
        widths = {}
        for name, (*_, o, _) in kind.matrices.items():
            parent = name.rpartition(".")[0]
            around = _module(model, parent)
            if isinstance(around, nn.MultiheadAttention):
                widths[parent] = around.embed_dim
            elif isinstance(around, nn.RNNBase):
                widths[parent] = (around.proj_size or around.hidden_size) * (1 + around.bidirectional)
            elif isinstance(around, nn.RNNCellBase):
                widths[parent] = around.hidden_size
            else:
                widths[name] = o
        return sum(2 * m * d + d + m for d in widths.values())

    return count


def prompt(method: Callable[..., lp.PEFTMethod], **fixed: Any) -> Callable[..., lp.PEFTMethod]:
    """A method of virtual tokens, with the token sequence of the kind as its target."""
    targets = lambda kind: kind.tokens[0] if kind.tokens is not None else "inputs"  # noqa: E731
    return lambda kind, **options: method(3, targets=targets(kind), **fixed, **options)


def tokens(layers: int = 0) -> Callable[[Kind, nn.Module], int]:
    """T d, and d (d + 1) for each square layer of the network that computes the tokens."""

    def count(kind: Kind, model: nn.Module) -> int:
        assert kind.tokens is not None
        _, d = kind.tokens
        return 3 * d + layers * d * (d + 1)

    return count


def in_modules(names: Callable[[Kind], tuple[str, ...]]) -> Callable[[Kind, nn.Module], int]:
    """All parameters of some modules, each once."""
    return lambda kind, model: sum({p: p.numel() for n in names(kind) for p in _module(model, n).parameters()}.values())


def norms(model: nn.Module) -> int:
    return sum(p.numel() for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False))


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


def selection(method: Callable[..., lp.PEFTMethod], **fixed: Any) -> Callable[..., lp.PEFTMethod]:
    return lambda kind, **options: method(**fixed, **options)


#: for an option whose behaviour does not depend on the layer kind
SOME = ("linear", "conv2d", "embedding", "mha", "llama")

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
    "miss": Row(weight(lp.MiSS, r=2), lambda kind, model: 2 * per_row(kind, model)),
    "miss_mini": Row(
        weight(lp.MiSS, r=2, mini_r=2, variant="mini"),
        lambda kind, model: 2 * sum(2 * prod(batch) for *batch, _, _ in kind.matrices.values()),
        kinds=("linear", "conv2d", "mha", "llama"),
    ),
    "miss_bat": Row(
        weight(lp.MiSS, r=2, variant="bat"),
        lambda kind, model: 2 * per_row(kind, model),
        additive=False,
        kinds=("linear", "mha", "llama", "gpt2"),
    ),
    "hira": Row(weight(lp.HiRA, r=2), low_rank(2), additive=False),
    "hira_dropout": Row(weight(lp.HiRA, r=2, dropout=0.3), low_rank(2), additive=False, kinds=("linear", "llama")),
    "lora_freeze_A": Row(lora(freeze_A=True), lora_half),
    "gated_lora": Row(
        weight(lp.GatedLoRA, r=2, alpha=4),
        lambda kind, model: low_rank(2)(kind, model) + sum(i + 1 for _, i in kind.matrices.values()),
        mergeable=False,
    ),
    "adalora": Row(weight(lp.AdaLoRA, target_r=1, init_r=2), triplets),
    "dylora": Row(weight(lp.DyLoRA, r=2, alpha=4), low_rank(2)),
    "dylora_frozen": Row(weight(lp.DyLoRA, r=2, alpha=4, frozen=True), low_rank(2), kinds=SOME),
    "ia3": Row(weight(lp.IA3, feedforward_targets=()), per_row, additive=False),
    "ia3_inputs": Row(
        lambda kind, **options: lp.IA3(targets=(), feedforward_targets=kind.targets, **options),
        per_input,
        additive=False,
    ),
    "ssf": Row(weight(lp.SSF), lambda kind, model: 2 * per_row(kind, model), additive=False),
    "bottleneck": Row(
        weight(lp.BottleneckAdapter, bottleneck_size=2, non_linearity="gelu"), bottlenecks(2), mergeable=False
    ),
    "prefix": Row(
        lambda kind, **options: lp.PrefixTuning(3, **options),
        lambda kind, model: 3 * kind.keys,
        identity=False,
        mergeable=False,
    ),
    "prefix_gate": Row(
        lambda kind, **options: lp.PrefixTuning(3, gate=True, **options),
        lambda kind, model: 3 * kind.keys + 3,
        mergeable=False,
    ),
    "prompt": Row(prompt(lp.PromptTuning, init="random"), tokens(), identity=False, mergeable=False),
    "ptuning": Row(prompt(lp.PTuning), tokens(layers=3), identity=False, mergeable=False),
    "visual_prompt": Row(
        lambda kind, **options: lp.VisualPromptTuning(2, **options),
        lambda kind, model: 2 * 16,
        identity=False,
        mergeable=False,
    ),
    "visual_prompt_deep": Row(
        lambda kind, **options: lp.VisualPromptTuning(2, deep=True, **options),
        lambda kind, model: 2 * 16 * 3,
        identity=False,
        mergeable=False,
    ),
    "full": Row(selection(lp.FullFineTuning), in_modules(lambda kind: ("",)), selects=True),
    "linear_probe": Row(selection(lp.LinearProbe), in_modules(lambda kind: (str(kind.head),)), selects=True),
    "last_layers": Row(selection(lp.LastLayers, n=1), in_modules(lambda kind: kind.last), selects=True),
    "gradual": Row(selection(lp.GradualUnfreezing), in_modules(lambda kind: ("",)), selects=True),
    "bitfit": Row(selection(lp.BitFit), lambda kind, model: all_biases(model), selects=True),
    "norm_tuning": Row(selection(lp.NormTuning), lambda kind, model: norms(model), selects=True),
    "rescale": Row(
        lambda kind, **options: Rescale(targets=kind.targets, **options),
        lambda kind, model: sum(prod(rows) for *rows, _ in kind.matrices.values()),
        identity=False,
        additive=False,
    ),
}

#: why an invariant does not apply to a method that trains the base itself
_NOTHING_ADDED = {
    "seeded": "nothing new is initialised",
    "disabled": "nothing is added that could be turned off",
    "eval": "nothing is added that could fail to run",
    "two": "two that train the same parameters are one",
    "bfloat16": "what trains belongs to the base, and how it is kept is for tests/methods/families/test_selection.py",
}


def hole(method: str, kind: str, invariant: str) -> str | None:
    """Why ``invariant`` is not tested for ``method`` on ``kind``; None if it is tested."""
    if (method, kind) in REFUSED:
        return REFUSED[method, kind][0]
    for key in [(m, k, i) for m in (method, ANY) for k in (kind, ANY) for i in (invariant, ANY)]:
        if key in HOLES:
            return HOLES[key]
    row = METHODS[method]
    if kind not in row.kinds:
        return "an option of another row, which this kind does not change"
    if row.selects and (invariant in _NOTHING_ADDED or invariant.startswith("merge")):
        return _NOTHING_ADDED.get(invariant, "it is in the weights already")
    if not row.mergeable and invariant.startswith("merge"):
        return "no function of a weight"
    return "starts elsewhere than its base" if invariant == "identity" and not row.identity else None


def cells(invariant: str, methods: list[str] | None = None, kinds: list[str] | None = None) -> Iterator[Any]:
    for method in methods or METHODS:
        for kind in kinds or KINDS:
            if hole(method, kind, invariant) is None:
                yield pytest.param(METHODS[method], KINDS[kind], id=f"{method}-{kind}")


def over_table(invariant: str, methods: list[str] | None = None, kinds: list[str] | None = None) -> Any:
    """Run a test over all cells of the table in which ``invariant`` is tested."""
    return pytest.mark.parametrize(("row", "kind"), list(cells(invariant, methods, kinds)))
