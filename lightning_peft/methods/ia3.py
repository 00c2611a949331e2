"""IA3: inhibiting and amplifying inner activations by learned vectors.

    keys, values:   y' = l * (W x + b),   l in R^out
    feed-forward:   y' = W (l * x) + b,   l in R^in    (the second linear layer's input)

Only the vectors l train: out or in parameters for a matrix of out x in. All start at one, so the adapted model starts
as its base. Both are changes of the weight (its rows with the bias, or its columns), so they merge.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv:2205.05638.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.names import is_within
from lightning_peft.core.targeting.blocks import find_sublayers, label
from lightning_peft.core.targeting.frozen_parts import why_frozen
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.patterns import TargetError, as_patterns
from lightning_peft.core.targeting.sites import Site, find_sites
from lightning_peft.methods.families.declared import target_patterns
from lightning_peft.methods.families.weight import WeightMethod, check_bias

__all__ = ["IA3"]

_KEY_VALUE = re.compile(r"(to_)?[kv](_proj|_lin)?|(key|value)(_proj|_layer)?|kv(_proj)?|[kv]_proj_weight|kv_b_proj")
_FUSED = re.compile(r"c_attn|w?qkv(_proj)?|query_key_value|w_pack|in_proj(_weight)?")


class IA3(WeightMethod):
    """IA3 (Liu et al. 2022, arXiv:2205.05638): learned scales of keys, values and feed-forward activations.

    Choose it when the adapter must be tiny (some thousand parameters, a tenth of LoRA's smallest) and data is scarce,
    as in few-shot learning of a language model. It costs quality where the task is far from what the base does, and
    wants a high learning rate (3e-3 in the paper).

    Args:
        targets: weights whose output is scaled: ``"all-key-value"`` (the key and value projections of each attention;
            one that is fused with the queries, such as ``c_attn`` or ``in_proj_weight``, is scaled whole) or patterns;
            empty for none.
        feedforward_targets: weights whose input is scaled: ``"all-feedforward"`` (the second linear layer of each
            feed-forward; of all experts, where it has some) or patterns; empty for none. What ``targets`` names as
            well is scaled at its input only, so the lists of Hugging Face PEFT can be used as they are.

    Raises:
        TargetError: nothing looks like an attention or a feed-forward; a pattern matches nothing.
        ValueError: a weight that cannot be scaled so.

    Example::

        trainer = L.Trainer(callbacks=[lp.IA3(trainable=["classifier"])])
    """

    resume_may_differ = WeightMethod.resume_may_differ | {"feedforward_targets"}

    targets: str | Sequence[str] = field(default="all-key-value", kw_only=False)
    feedforward_targets: str | Sequence[str] = field(
        default="all-feedforward", converter=target_patterns, kw_only=False
    )

    def check(self) -> None:
        if not self.feedforward_targets and not self.targets:
            raise TargetError("targets and feedforward_targets are both empty: nothing would train")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._at_input: frozenset[str] = frozenset()

    def find(self, model: nn.Module, heads: list[str]) -> tuple[dict[str, Site], list[str]]:
        outputs = as_patterns(self.targets, "targets")
        inputs = as_patterns(self.feedforward_targets, "feedforward_targets")
        words = _words(model, outputs, heads)
        found = find_sites(model, [*outputs, *inputs], self.exclude, heads, words=words)
        self._at_input = frozenset(find_sites(model, inputs, (), heads, words=words)[0]) if inputs else frozenset()
        return found

    def build(self, site: Site) -> WeightAdapter:
        return InputScale(site) if site.name in self._at_input else OutputScale(site)

    def describe(self, adapter: WeightAdapter) -> str:
        return "IA3 scale of the input" if isinstance(adapter, InputScale) else "IA3 scale of the output"


class OutputScale(WeightAdapter):
    """A scale for each row of the matrix and of the bias: ``ia3_l`` (..., out, 1)."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        check_bias(site)
        self.scales_bias = site.bias is not None
        self.ia3_l = nn.Parameter(torch.ones(*site.shape[:-1], 1))

    def transform(self, weight: Tensor) -> Tensor:
        return weight * self.ia3_l

    @property
    def changes_bias(self) -> bool:
        return self.scales_bias

    def transform_bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.ia3_l.flatten()

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # In the scale's own type, since half precision would round a scale near one away; back to that of y.
        return (y * self.layout.features(host, self.ia3_l.flatten())).to(y.dtype)


class InputScale(WeightAdapter):
    """A scale for each input feature of the layer: ``ia3_l`` (..., 1, in)."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        if isinstance(site.layout, EmbeddingLayout):
            raise ValueError(f"{site.name!r} is an embedding, which has no input to scale: name it in targets instead")
        self.inputs, self.groups = site.layout.inputs(site.module, site.shape)
        self.ia3_l = nn.Parameter(torch.ones(*site.shape[:-2], 1, self.inputs))

    @property
    def modifies_weight(self) -> bool:
        return not self.layout.has_activation

    def transform(self, weight: Tensor) -> Tensor:
        if weight.ndim > 2:
            return weight * self.ia3_l
        # For a convolution every group of outputs sees its own inputs, each at all positions of the kernel.
        rows, per_group = weight.shape[0] // self.groups, self.inputs // self.groups
        by_input = weight.reshape(self.groups, rows, per_group, -1) * self.ia3_l.view(self.groups, 1, per_group, 1)
        return by_input.view(weight.shape)

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scale = self.layout.features(host, self.ia3_l.flatten())
        if args:
            return call((args[0] * scale).to(args[0].dtype), *args[1:], **kwargs)
        first, x = next(iter(kwargs.items()))
        return call(**{**kwargs, first: (x * scale).to(x.dtype)})


def _words(model: nn.Module, outputs: Sequence[str], heads: list[str]) -> dict[str, Callable[[], list[str]]]:
    """The reserved words, each with a function that finds the weights that it means; ``outputs`` are ``targets``."""

    def found(word: str, kind: str, what: str) -> list[str]:
        sublayers = [s for s in find_sublayers(model) if s.kind == kind]
        names = [n for s in sublayers for n in (s.outputs if kind == "feedforward" else _keys_and_values(s.sites))]
        names = [n for n in names if not is_within(n, *heads)]
        if not names:
            argument = "targets" if word in outputs else "feedforward_targets"
            raise TargetError(
                f"{argument}={word!r}: nothing in this model looks like {what}; give patterns of the layers to "
                f"scale, or {argument}=() for none{why_frozen(model)}"
            )
        return names

    keys_and_values = "the key and value projections of an attention"
    return {
        "all-key-value": lambda: found("all-key-value", "attention", keys_and_values),
        "all-feedforward": lambda: found("all-feedforward", "feedforward", "a feed-forward"),
    }


def _keys_and_values(sites: Sequence[str]) -> list[str]:
    separate = [name for name in sites if _KEY_VALUE.fullmatch(label(name))]
    return separate or [name for name in sites if _FUSED.fullmatch(label(name))]
