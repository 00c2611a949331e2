"""VeRA: vector-based random matrix adaptation.

    W' = W + diag(b) B diag(d) A,    A in R^{r x in}, B in R^{out x r} random, frozen and shared by all layers

Only d in R^r and b in R^out train: r + out parameters for each matrix. b starts at zero, so the adapted model starts
as its base. One A and one B, as large as the largest of the adapted matrices, serve every layer; a layer uses their
first columns and first rows. On activations it is y + (diag(b) B diag(d)) (A x), two thin products.

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
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.sites import Site
from lightning_peft.methods.families.arguments import integer, nonzero, positive_int, probability
from lightning_peft.methods.families.weight import WeightMethod, check_dropout
from lightning_peft.ops.dropout import dropped

__all__ = ["VeRA"]


class SharedProjection(nn.Module):
    """``vera_A`` (r, widest in) and ``vera_B`` (widest out, r), drawn from ``seed`` alone.

    Drawn as Hugging Face PEFT draws them, so that its files, which may leave them out, mean the same here.

    Args:
        shape: (r, widest in, widest out).
        seed: of torch's CPU generator.
        save: keep both in checkpoints; otherwise a few of their values, by which loading can tell that the seed
            still gives the same.
    """

    vera_A: Tensor
    vera_B: Tensor
    sample: Tensor | None

    def __init__(self, shape: tuple[int, int, int], seed: int, save: bool) -> None:
        super().__init__()
        r, columns, rows = shape
        generator = torch.Generator("cpu").manual_seed(seed)
        a, b = torch.empty(r, columns, dtype=torch.float32), torch.empty(rows, r, dtype=torch.float32)
        for matrix in (a, b):  # He's uniform initialisation, for a gain of sqrt(2)
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
                f"{prefix}sample: the projections that this state was trained with are not those that the seed gives "
                "here (another torch?): train with save_projection=True to keep them in the file"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _sample(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([t.flatten()[:: max(1, t.numel() // 7)][:8] for t in (a, b)])


class VeRAAdapter(WeightAdapter):
    """``vera_lambda_d`` (..., r) and ``vera_lambda_b`` (..., out); the first of a model also holds ``projection``."""

    def __init__(self, site: Site, shared: SharedProjection, owner: bool, d_initial: float, dropout: float) -> None:
        super().__init__(site)
        *batch, rows, _ = site.shape
        self.dropout = 0.0 if isinstance(site.layout, EmbeddingLayout) else dropout
        self.vera_lambda_d = nn.Parameter(torch.full((*batch, len(shared.vera_A)), float(d_initial)))
        self.vera_lambda_b = nn.Parameter(torch.zeros(*batch, rows))
        if owner:
            self.projection = shared
        self._shared = (shared,)  # not a child of this module: one copy, under one key
        self._shape = site.shape[-2:]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The parts (r, in) of A and (out, r) of B that this weight uses, where its adapter is."""
        (shared,), (rows, columns) = self._shared, self._shape
        a, b = shared.vera_A[:, :columns], shared.vera_B[:rows]
        return a.to(self.vera_lambda_d.device), b.to(self.vera_lambda_d.device)

    def scaled(self, b: Tensor) -> Tensor:
        """diag(b) B diag(d): both vectors get their gradients from that of one small matrix."""
        return b * (self.vera_lambda_b[..., None] * self.vera_lambda_d[..., None, :])

    def delta(self, weight: Tensor) -> Tensor:
        a, b = self.matrices()
        return self.scaled(b) @ a

    def low_rank(self) -> tuple[Tensor, Tensor]:
        a, b = self.matrices()
        return self.vera_lambda_d[..., None] * a, self.vera_lambda_b[..., None] * b

    @property
    def needs_input(self) -> str | None:
        return f"dropout={self.dropout}" if self.dropout else None

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def down(x: Tensor, a: Tensor) -> Tensor:
            return self.layout.down(host, x, a)

        a, b = self.matrices()
        h = dropped(down, x, a, self.dropout) if self.dropout and self.training else down(x, a)
        return self.layout.up(host, h, self.scaled(b), y, 1.0)

    def extra_repr(self) -> str:
        return f"r={self.vera_lambda_d.shape[-1]}, dropout={self.dropout}"


class VeRA(WeightMethod):
    """Two small vectors per layer around random matrices that all layers share (arXiv:2310.11454).

    Choose it when many adapters must be stored or served: it trains r + out parameters per layer, ten times fewer
    than LoRA, at nearly its quality, and wants a learning rate ten times LoRA's. It computes as LoRA of its rank,
    which is high: at r=256 two products of 256 beside each layer. Merged it
    costs nothing.

    Args:
        r: the rank of the shared matrices.
        dropout: probability of dropping an element of the adapter's input while training. An embedding takes none.
        d_initial: what d starts at.
        projection_seed: of the shared matrices; the only thing beside their sizes that they depend on.
        save_projection: keep the shared matrices in checkpoints (once, with the first adapted layer), so that these
            need no random numbers. Otherwise they are drawn again, and loading checks that they are the same.

    Raises:
        ValueError: a rank below 1, a dropout outside [0, 1), a d_initial of 0 (nothing would ever train), a dropout
            on a weight that is not called with activations.

    Example::

        trainer = L.Trainer(callbacks=[lp.VeRA(r=256, targets=["q_proj", "v_proj"], trainable=["classifier"])])
    """

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
