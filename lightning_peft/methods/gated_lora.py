"""Gated LoRA: low-rank adaptation whose update is let through by a learned gate, as UniPELT combines methods.

    y' = W x + sigmoid(u x + c) s B A x,    A in R^{r x in}, B in R^{out x r}, u in R^in, c in R,    s = alpha / r

r (in + out) + in + 1 parameters for a matrix of in x out. The gate opens for each position by what the layer reads
there, so the update is no function of the weight alone and does not merge. B starts at zero, so the adapted model
starts as its base. The paper has the gate in the place of s, which is s = 1: ``alpha=r``.

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
    """LoRA's pair, and ``gate`` (1, in)."""

    def __init__(self, site: Site, *args: Any) -> None:
        super().__init__(site, *args)
        self.gate = nn.Linear(site.shape[-1], 1)

    def weights(self) -> Mapping[str, WeightAdapter]:
        return {}  # the gate depends on the input, so there is no weight to fold it into

    def unreadable(self) -> str:
        return (
            f"a gate is not supported on {self.site_name!r}: another module reads this weight and computes without "
            "calling its layer, so there is no input to open the gate by. Exclude it, or add an lp.LoRA for it"
        )

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        gate = F.linear(x, self.gate.weight.to(x.dtype), self.gate.bias.to(x.dtype))
        return y + gate.sigmoid() * super().output(host, x, torch.zeros_like(y))


class GatedLoRA(LoRA):
    """LoRA whose update a learned gate lets through, position by position (UniPELT, arXiv:2110.07577).

    Choose it beside other gated methods (``BottleneckAdapter(gate=True)``, ``PrefixTuning(gate=True)``), where the
    gates are to find which of them helps the task; alone, take LoRA, which merges. It costs LoRA's two thin
    products and one number more for each position, at inference too: it cannot be merged.

    Args:
        r, alpha, dropout, targets, exclude, trainable, name: see :class:`lightning_peft.LoRA`, of which it has every
            option.

    Raises:
        ValueError: as LoRA; or a layer that is not called with vectors, as a convolution, an embedding or an attention
            that reads its weights itself.

    Example::

        trainer = L.Trainer(callbacks=[
            lp.GatedLoRA(r=8, alpha=8, targets=["q_proj", "v_proj"], name="lora"),
            lp.BottleneckAdapter("pfeiffer", gate=True, name="adapter"),
            lp.PrefixTuning(10, gate=True, name="prefix"),
        ])
    """

    adapter_class = GatedLoRAAdapter

    def build(self, site: Site) -> LoRAAdapter:
        if not site.layout.vectors:
            raise ValueError(
                f"{site.name!r} is not called with vectors that a gate could read: GatedLoRA adapts linear layers; "
                "exclude it, or add an lp.LoRA for it"
            )
        return super().build(site)
