"""VeRA: vector-based random matrix adaptation.

    W' = W + diag(b) B diag(d) A,    A in R^{r x in}, B in R^{out x r} random, frozen and shared by all layers

Only d in R^r and b in R^out train: r + out parameters per matrix. b starts at zero, so the adapted model initially
computes what the base computes. A and B are as large as the largest adapted matrix requires; each layer uses their
first columns and rows. On activations a layer computes y + (diag(b) B diag(d)) (A x), two thin products.

Kopiczko, Blankevoort and Asano 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from attrs import field
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.low_rank import LowRankAdapter
from lightning_peft.core.batching.batched import BatchedAdapters
from lightning_peft.core.sharded_tensors import distribute_like
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import integer, nonzero, positive_int, probability
from lightning_peft.methods.families.weight import WeightMethod, check_dropout

__all__ = ["VeRA"]


class SharedProjection(nn.Module):
    """``vera_A`` (r, largest in) and ``vera_B`` (largest out, r), which depend on ``seed`` and their shapes only.

    They are drawn exactly as Hugging Face PEFT draws them, because its files may omit them.

    Args:
        shape: (r, largest in, largest out).
        seed: seed of a torch CPU generator.
        save: store both in checkpoints. If False, a few of their values are stored instead, so that loading can check
            that the seed still produces the same matrices.
    """

    vera_A: Tensor
    vera_B: Tensor
    sample: Tensor | None

    def __init__(self, shape: tuple[int, int, int], seed: int, save: bool) -> None:
        super().__init__()
        r, columns, rows = shape
        generator = torch.Generator("cpu").manual_seed(seed)
        a, b = torch.empty(r, columns, dtype=torch.float32), torch.empty(rows, r, dtype=torch.float32)
        for matrix in (a, b):  # He's uniform initialisation with a gain of sqrt(2)
            bound = math.sqrt(6 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        dtype = torch.get_default_dtype()
        self.register_buffer("vera_A", a.to(dtype), persistent=save)
        self.register_buffer("vera_B", b.to(dtype), persistent=save)
        self.register_buffer("sample", None if save else _sample(a, b))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}sample")
        here = self.sample
        if saved is not None and here is not None and not torch.equal(saved.to(here), here):
            error_messages: list[str] = args[-1]
            error_messages.append(
                f"{prefix}sample: projection_seed does not reproduce the random matrices that this state was trained "
                "with; the torch version may differ. Train with save_projection=True to store them in the file"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _sample(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([t.flatten()[:: max(1, t.numel() // 7)][:8] for t in (a, b)])


class VeRAAdapter(LowRankAdapter):
    """``vera_lambda_d`` (..., r) and ``vera_lambda_b`` (..., out); the model's first one also owns ``projection``."""

    neutral = {"vera_lambda_b": 0.0}

    def __init__(self, site: Site, shared: SharedProjection, owner: bool, d_initial: float, dropout: float) -> None:
        super().__init__(site, dropout)
        *batch, rows, _ = site.shape
        self.vera_lambda_d = nn.Parameter(torch.full((*batch, len(shared.vera_A)), float(d_initial)))
        self.vera_lambda_b = nn.Parameter(torch.zeros(*batch, rows))
        if owner:
            self.projection = shared
        # a tuple, so that it is not registered as a child: checkpoints hold one copy, under one key
        self._shared = (shared,)
        self._shape = site.shape[-2:]

    def _projections(self) -> tuple[Tensor, Tensor]:
        (shared,), (rows, columns) = self._shared, self._shape
        device = self.vera_lambda_d.device
        # They are not parameters of this module, so they are not distributed with it.
        a, b = shared.vera_A[:, :columns].to(device), shared.vera_B[:rows].to(device)
        return distribute_like(a, self.vera_lambda_d), distribute_like(b, self.vera_lambda_d)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (..., r, in) and diag(b) B diag(d) (..., out, r)."""
        a, b = self._projections()
        # Both vectors scale the small B, so that backward needs no second product over the activations.
        a = a.expand(*self.vera_lambda_d.shape[:-1], *a.shape)  # a leading dimension of 1, because all experts share it
        return a, b * (self.vera_lambda_b[..., None] * self.vera_lambda_d[..., None, :])

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        r = self.vera_lambda_d.shape[-1]
        if not self.layout.vectors or self.vera_lambda_d.ndim > 1 or x.numel() > r * x.shape[-1]:
            return super().output(host, x, y)
        # With fewer tokens than r, the vectors are smaller work on the activations than on B, and B needs no gradient.
        a, b = self._projections()
        h = self.project(host, x, a) * self.vera_lambda_d
        z = self.layout.down(host, h.to(y.dtype), b)
        return torch.addcmul(y, z, self.vera_lambda_b).to(y.dtype)

    def batched_class(self, host: nn.Module) -> type[BatchedAdapters] | None:
        # Disable LowRankAdapter's batched path, which would copy the large shared matrices for every row of the batch.
        return WeightAdapter.batched_class(self, host)

    def extra_repr(self) -> str:
        return f"r={self.vera_lambda_d.shape[-1]}, dropout={self.dropout}"


class VeRA(WeightMethod):
    """LoRA with random matrices that all layers share; each layer trains two small vectors (arXiv:2310.11454).

    Choose it when many adapters must be stored or served: it trains r + out parameters per layer, about a tenth of
    LoRA's, at nearly the same quality. It needs a learning rate about ten times LoRA's. It costs as much compute as
    LoRA at the same rank, and its rank is high (256 by default). Merged, it costs nothing.

    Args:
        r: rank of the shared matrices.
        dropout: probability of zeroing an element of the adapter's input during training; embeddings ignore it.
        d_initial: initial value of d.
        projection_seed: seed of the shared matrices, which depend on this seed and their sizes only.
        save_projection: store the shared matrices in checkpoints (once, with the first adapted layer). If False, they
            are drawn again from the seed, and loading checks that they are the same.

    Raises:
        ValueError: if r is below 1; if dropout is outside [0, 1), or set for a weight that is not called with
            activations; if d_initial is 0, since nothing would train.

    Example::

        trainer = L.Trainer(callbacks=[lp.VeRA(r=256, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

    parameter_count = "r + out"
    resume_may_differ = WeightMethod.resume_may_differ | {"dropout", "d_initial"}

    r: int = field(default=256, validator=positive_int, kw_only=False)
    dropout: float = field(default=0.0, validator=probability)
    d_initial: float = field(default=0.1, validator=nonzero)  # at 0 nothing would train
    projection_seed: int = field(default=0, validator=integer)
    save_projection: bool = True

    def build_all(self, sites: Mapping[str, Site]) -> dict[str, WeightAdapter]:
        built: dict[str, WeightAdapter] = {}
        rows, columns = (max(site.shape[i] for site in sites.values()) for i in (-2, -1))
        with self.seeded_init("projection"):
            shared = SharedProjection((self.r, columns, rows), self.projection_seed, self.save_projection)
        for name, site in sites.items():
            check_dropout("VeRA", self.dropout, site)
            with self.seeded_init(name):
                built[name] = VeRAAdapter(site, shared, not built, self.d_initial, self.dropout)
        return built

    def build(self, site: Site) -> WeightAdapter:
        return self.build_all({site.name: site})[site.name]

    def describe(self, adapter: WeightAdapter) -> str:
        return f"VeRA r={self.r}"
