"""DoRA: weight-decomposed low-rank adaptation.

    W' = m * (W + s B A) / ||W + s B A||        one norm and one m per output of the matrix

LoRA adapts the direction of each weight vector, and m in R^out its magnitude: r (in + out) + out parameters. m starts
as the norms of W, and B at zero, so the adapted model initially computes what the base computes. As in section 4.3 of
the paper, the norm is treated as a constant in the backward pass. With g = m / ||W + s B A|| the layer computes

    y' = g (y + s B A x) + (1 - g) bias        for y = W x + bias

so the base layer's output y is reused. The norm does not need the full-size product B A either:

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>        inner products per row

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.effective_weights import base_tensor, effective_weights, values_before
from lightning_peft.core.adapters.stack import Adapted
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.core.sharded_tensors import is_sharded
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.lora import LoRA, LoRAAdapter
from lightning_peft.methods.shared.lora_init import values_of

__all__ = ["DoRA"]


class DoRAAdapter(LoRAAdapter):
    """The factors of LoRA, and ``magnitude`` (..., out)."""

    def __init__(self, site: Site, *args: Any) -> None:
        super().__init__(site, *args)
        weight = values_of(site, "DoRA")
        if has_mixin(site.module, Adapted):  # earlier adapters change the weight whose norms m starts from
            now = effective_weights(site.module, site.module.adapters.running())  # type: ignore[union-attr, operator]
            weight = site.layout.matrix(now.get(self.parameter, site.weight)).to(weight.dtype)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        norm = self._norm(weight)
        self.magnitude = nn.Parameter(norm.to("cpu", self.lora_A.dtype).clone())

    def neutral_values(self, host: nn.Module) -> Mapping[str, Tensor | float]:
        # With B at zero and m at the norms of the weight that it adapts, W' is that weight.
        runs = self in host.adapters.running()  # type: ignore[union-attr, operator]
        weight = values_before(host, self, self.parameter)[0] if runs else base_tensor(host, self.parameter)
        assert weight is not None
        matrix = self.layout.matrix(weight)
        norm = torch.linalg.vector_norm(matrix.to(torch.promote_types(matrix.dtype, self.magnitude.dtype)), dim=-1)
        return {**LoRAAdapter.neutral, "magnitude": norm}

    def gain(self, weight: Tensor) -> Tensor:
        """m / ||W + s B A|| (..., out); no gradient flows through the norm."""
        return self.magnitude / self._norm(weight)

    def transform(self, weight: Tensor) -> Tensor:
        return self.gain(weight)[..., None] * (weight + self.delta(weight))

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = super().output(host, x, y)
        weight, bias = values_before(host, self, self.parameter, "bias")
        assert weight is not None
        stored = isinstance(weight, nn.Parameter) and weight is stored_tensor(host, self.parameter)
        gain = self.magnitude / self._remembered(weight, stored)
        by = self.layout.features(host, gain)
        if bias is None:
            return (z * by).to(z.dtype)
        return torch.addcmul(self.layout.features(host, (1 - gain) * bias), z, by).to(z.dtype)

    def batched_class(self, host: nn.Module) -> None:
        return None  # the norms depend on the weight after the other adapters of each row

    def _remembered(self, weight: Tensor, stored: bool) -> Tensor:
        """The norms for ``weight``; a frozen adapter in evaluation computes them once and keeps them."""
        # Trainable parameters are never cached: weight averaging writes them through ``.data``, which does not
        # change ``_version``, so the cache could not see the change.
        fixed = not any(p.requires_grad for p in self.parameters()) and not self.training
        if not fixed or not stored or torch.compiler.is_compiling() or weight.is_inference() or is_sharded(weight):
            return self._norm(self.layout.matrix(weight))
        key = tuple((id(t), t.data_ptr(), t._version) for t in (weight, self.lora_A, self.lora_B))
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):  # inference tensors could not be used in a later training step
                self._kept = key, self._norm(self.layout.matrix(weight))
        return self._kept[1]

    @torch.no_grad()
    def _norm(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            a, b = self.factors()
            w = weight.to(torch.promote_types(weight.dtype, a.dtype))
            a, b = a.to(w), b.to(w)
            square = torch.linalg.vector_norm(w, dim=-1) ** 2
            square = square + 2 * self.scale * ((w @ a.mT) * b).sum(-1)
            square = square + self.scale**2 * ((b @ (a @ a.mT)) * b).sum(-1)
            # A weight vector of zeros has no direction; its gain is 0 / tiny = 0.
            return square.clamp_min(0).sqrt().clamp_min(torch.finfo(w.dtype).tiny)

    def train(self, mode: bool = True) -> DoRAAdapter:
        self._kept = None
        return super().train(mode)  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class DoRA(LoRA):
    """LoRA that trains the magnitude of each output separately from its direction (arXiv:2402.09353).

    Choose it when LoRA at a low rank falls short: it comes closer to full fine-tuning for one more parameter per
    output. It costs one more thin product, and a norm over each adapted weight in every forward pass. A frozen adapter
    (as loaded) computes the norms once after ``eval()``, and a merged one costs nothing.

    Args:
        r, alpha, dropout, targets, exclude, trainable, name: see :class:`lightning_peft.LoRA`; all its options are
            available. Dropout acts on the low-rank path only, never on the base's output.

    Raises:
        ValueError: if LoRA would raise it, or if the norms of a weight cannot be computed because it is quantised or on
            the meta device.

    Example::

        trainer = L.Trainer(callbacks=[lp.DoRA(r=8, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    parameter_count = "r (in + out) + out"
    adapter_class = DoRAAdapter

    def build(self, site: Site) -> LoRAAdapter:
        if self.lora_bias:
            raise ValueError(
                "DoRA does not support lora_bias=True: it scales the weight and leaves the bias unchanged. Set "
                "bias='lora_only' to train the biases of the base"
            )
        return super().build(site)
