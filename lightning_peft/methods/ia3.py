"""IA3: inhibiting and amplifying inner activations by learned vectors.

    keys, values:   y' = l * (W x + b),   l in R^out
    feed-forward:   y' = W (l * x) + b,   l in R^in    (the input of the second linear layer)

Only the vectors l train: out or in parameters for an out x in matrix. They start at one, so the adapted model initially
computes what the base computes. Both forms scale the weight (its rows and the bias, or its columns), so they can be
merged.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.module_io import with_input
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.patterns import TargetError, as_patterns
from lightning_peft.core.targeting.sites import Site, find_sites
from lightning_peft.core.targeting.sublayer_weights import sublayer_weights
from lightning_peft.methods.families.declared import target_patterns
from lightning_peft.methods.families.weight import WeightMethod, check_bias

__all__ = ["IA3"]


class IA3(WeightMethod):
    """Learned scales for keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638).

    Choose it when the adapter must be tiny (a few thousand parameters, about a tenth of the smallest LoRA) and data is
    scarce, as in few-shot learning with a language model. It costs quality if the task is far from what the base was
    trained for, and needs a high learning rate (3e-3 in the paper).

    Args:
        targets: weights whose output is scaled: ``"all-key-value"`` (the key and value projections of each attention;
            a projection that also computes the queries, such as ``c_attn`` or ``in_proj_weight``, is scaled as a whole)
            or patterns. Empty scales no output.
        feedforward_targets: weights whose input is scaled: ``"all-feedforward"`` (the second linear layer of each
            feed-forward block, or of each of its experts) or patterns. Empty scales no input. A weight that ``targets``
            also matches is scaled at its input only, so the lists of Hugging Face PEFT work unchanged.

    Raises:
        TargetError: if no attention or feed-forward block is found, or a pattern matches nothing.
        ValueError: if a weight cannot be scaled: the input of an embedding, or an output whose bias is shared.

    Example::

        trainer = L.Trainer(callbacks=[lp.IA3(trainable=["classifier"])])
    """

    parameter_count = "one factor per feature"
    resume_may_differ = WeightMethod.resume_may_differ | {"feedforward_targets"}

    targets: str | Sequence[str] = field(default="all-key-value", kw_only=False)
    feedforward_targets: str | Sequence[str] = field(
        default="all-feedforward", converter=target_patterns, kw_only=False
    )

    def check(self) -> None:
        if not self.feedforward_targets and not self.targets:
            raise TargetError("targets and feedforward_targets are both empty, so nothing would train: set one of them")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._at_input: frozenset[str] = frozenset()

    def find(self, model: nn.Module, heads: list[str]) -> tuple[dict[str, Site], list[str]]:
        outputs = as_patterns(self.targets, "targets")
        inputs = as_patterns(self.feedforward_targets, "feedforward_targets")
        words = {
            word: partial(sublayer_weights, model, word, "targets" if word in outputs else "feedforward_targets", heads)
            for word in ("all-key-value", "all-feedforward")
        }
        found = find_sites(model, [*outputs, *inputs], self.exclude, heads, words=words)
        self._at_input = frozenset(find_sites(model, inputs, (), heads, words=words)[0]) if inputs else frozenset()
        return found

    def build(self, site: Site) -> WeightAdapter:
        return InputScale(site) if site.name in self._at_input else OutputScale(site)

    def describe(self, adapter: WeightAdapter) -> str:
        return "IA3 scale of the input" if isinstance(adapter, InputScale) else "IA3 scale of the output"


class OutputScale(WeightAdapter):
    """A scale for each row of the matrix and of the bias: ``ia3_l`` (..., out, 1)."""

    neutral = {"ia3_l": 1.0}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        check_bias(site)
        self.changes_bias = site.bias is not None
        self.ia3_l = nn.Parameter(torch.ones(*site.shape[:-1], 1))

    def transform(self, weight: Tensor) -> Tensor:
        return weight * self.ia3_l

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.ia3_l.flatten()

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # Multiply in the scale's dtype: half precision would round scales close to one to exactly one.
        return (y * self.layout.features(host, self.ia3_l.flatten())).to(y.dtype)


class InputScale(WeightAdapter):
    """A scale for each input feature of the layer: ``ia3_l`` (..., 1, in)."""

    neutral = {"ia3_l": 1.0}

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        if isinstance(site.layout, EmbeddingLayout):
            raise ValueError(f"{site.name!r} is an embedding, so it has no input to scale: name it in targets instead")
        self.inputs, self.groups = site.layout.inputs(site.module, site.shape)
        self.ia3_l = nn.Parameter(torch.ones(*site.shape[:-2], 1, self.inputs))

    @property
    def modifies_weight(self) -> bool:
        return not self.layout.has_activation

    def transform(self, weight: Tensor) -> Tensor:
        if weight.ndim > 2:
            return weight * self.ia3_l
        # In a grouped convolution each group of outputs has its own input channels; kernel positions share a scale.
        rows, per_group = weight.shape[0] // self.groups, self.inputs // self.groups
        by_input = weight.reshape(self.groups, rows, per_group, -1) * self.ia3_l.view(self.groups, 1, per_group, 1)
        return by_input.view(weight.shape)

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scale = self.layout.features(host, self.ia3_l.flatten())
        args, kwargs = with_input(args, kwargs, lambda x: (x * scale).to(x.dtype))
        return call(*args, **kwargs)
