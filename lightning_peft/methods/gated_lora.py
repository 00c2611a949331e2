"""Gated LoRA: low-rank adaptation with a learned gate on the update, as used by UniPELT to combine methods.

    y' = W x + sigmoid(u x + c) s B A x,    A in R^{r x in}, B in R^{out x r}, u in R^in, c in R,    s = alpha / r

It trains r (in + out) + in + 1 parameters for an in x out matrix. The gate depends on the layer's input at each
position, so the update is not a function of the weight alone and cannot be merged. B starts at zero, so the adapted
model initially computes what the base computes. The paper has no factor s: set ``alpha=r`` for its formula.

Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv:2110.07577.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.lora import LoRA, LoRAAdapter

__all__ = ["GatedLoRA"]


class GatedLoRAAdapter(LoRAAdapter):
    """The factors of LoRA, and ``gate`` (1, in)."""

    def __init__(self, site: Site, *args: Any) -> None:
        super().__init__(site, *args)
        self.gate = nn.Linear(site.shape[-1], 1)

    def weights(self) -> Mapping[str, WeightAdapter]:
        return {}  # the gate depends on the input, so the update cannot be merged into the weight

    def unreadable(self) -> str:
        return (
            f"GatedLoRA is not supported on {self.site_name!r}: another module reads this weight without calling its "
            "layer, so the gate gets no input. Exclude it, or add an lp.LoRA for it"
        )

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        gate = F.linear(x, self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype))
        return y + gate.sigmoid() * super().output(host, x, torch.zeros_like(y))


class GatedLoRA(LoRA):
    """LoRA with a learned gate that scales the update at each position (UniPELT, arXiv:2110.07577).

    Choose it when you combine it with other gated methods (``BottleneckAdapter(gate=True)``,
    ``PrefixTuning(gate=True)``): the gates learn which of them helps the task. On its own, LoRA is the better choice.
    It costs LoRA's two thin products and the gate at inference too, because it cannot be merged.

    Args:
        r, alpha, dropout, targets, exclude, trainable, name: see :class:`lightning_peft.LoRA`; all its options are
            available.

    Raises:
        ValueError: if LoRA would raise it, or if a targeted layer is not called with vectors: a convolution, an
            embedding, or an attention module that reads its weights directly.

    Example::

        trainer = L.Trainer(callbacks=[
            lp.GatedLoRA(r=8, alpha=8, targets=["q_proj", "v_proj"], name="lora"),
            lp.BottleneckAdapter("pfeiffer", gate=True, name="adapter"),
            lp.PrefixTuning(10, gate=True, name="prefix"),
        ])
    """

    parameter_count = "r (in + out) + in + 1"
    adapter_class = GatedLoRAAdapter

    def build(self, site: Site) -> LoRAAdapter:
        if not site.layout.vectors:
            raise ValueError(
                f"{site.name!r} is not called with vectors, which the gate needs: GatedLoRA adapts linear layers only. "
                "Exclude it, or add an lp.LoRA for it"
            )
        return super().build(site)
