"""Initial values of LoRA's two factors.

| init | A | B | the product B A |
|---|---|---|---|
| kaiming | uniform as in ``nn.Linear`` | 0 | 0 |
| gaussian | normal, standard deviation 1/r | 0 | 0 |
| orthogonal | rows from one half of an orthogonal r x r matrix | columns from the other half | 0 |
| pissa | sqrt(S / s) V^T of the r largest singular values | U sqrt(S / s) | W's principal part / s |
| olora | the first r rows of R, W = Q R | the first r columns of Q | a part of W |

PiSSA: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv:2404.02948. OLoRA: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
arXiv:2406.01775. Orthogonal: datta0.github.io/posts/rethink-lora-init.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.sharded_tensors import gather_full
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.sites import Site

__all__ = ["check_init", "initial_factors", "reads_weight", "values_of"]

_NITER = re.compile(r"pissa_niter_(\d+)")


def check_init(init: Any) -> None:
    """Check that ``init`` names an initialisation.

    Raises:
        ValueError: if it does not; the message lists the known names.
    """
    known = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
    if not isinstance(init, str) or not (init in known or _NITER.fullmatch(init)):
        raise ValueError(
            f"init must be one of {', '.join(map(repr, known))} or 'pissa_niter_<iterations>' such as "
            f"'pissa_niter_4', got {init!r}"
        )


def reads_weight(init: str) -> bool:
    """Whether the factors start as a part of the weight, so that their initial product must be subtracted from it."""
    return init.startswith("pissa") or init == "olora"


def values_of(site: Site, why: str) -> Tensor:
    """The matrix at ``site`` in float32 or wider.

    Raises:
        ValueError: if the weight is on the meta device or quantised.
    """
    weight = site.weight
    if weight.is_meta:
        raise ValueError(
            f"{why} reads the weights, but {site.name!r} is on the meta device and has no values yet: "
            "load the base first"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{why} reads the weights, but {site.name!r} is quantised (stored as {weight.dtype}): exclude it"
        )
    wide = torch.promote_types(weight.dtype, torch.float32)
    return site.layout.matrix(gather_full(weight.detach())).to(wide)


def initial_factors(site: Site, r: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """Initial factors A (..., r, in) and B (..., out, r); random numbers come from torch's global generator.

    Raises:
        ValueError: if the initialisation does not support this weight or rank.
    """
    *batch, rows, columns = site.shape
    if init == "orthogonal":
        return _orthogonal(site, r)
    if reads_weight(init):
        return _parts_of_weight(site, r, scale, init)
    a, b = torch.zeros(*batch, r, columns), torch.zeros(*batch, rows, r)
    if isinstance(site.layout, EmbeddingLayout):
        return a, b.normal_()  # a lookup reads columns of A; PEFT starts A at zero for embeddings, and B at random
    if init == "gaussian":
        return a.normal_(std=1 / r), b
    bound = 1 / math.sqrt(columns)  # kaiming_uniform_ with a = sqrt(5), for each matrix of a batch
    return a.uniform_(-bound, bound), b


def _orthogonal(site: Site, r: int) -> tuple[Tensor, Tensor]:
    *batch, rows, columns = site.shape
    if r % 2:
        raise ValueError(
            f"init='orthogonal' gives each factor one half of an orthogonal matrix, so r must be even, but it is {r} "
            f"at {site.name!r}: use {r + 1}"
        )
    q = torch.linalg.qr(torch.randn(*batch, r, r)).Q
    a = torch.randn(*batch, columns, r // 2) @ q[..., 0::2, :] / 10
    return a.mT.contiguous(), torch.randn(*batch, rows, r // 2) @ q[..., 1::2, :] / 10


def _parts_of_weight(site: Site, r: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    weight = values_of(site, f"init={init!r}")
    largest = min(weight.shape[-2:])
    if r > largest:
        raise ValueError(
            f"init={init!r} needs r={r} singular or basis vectors of {site.name!r} ({'x'.join(map(str, site.shape))}), "
            f"which has only {largest}: lower r, exclude the layer, or lower its rank alone: "
            f"rank_pattern={{'{site.name}': {largest}}}"
        )
    if scale < 0:
        raise ValueError(
            f"init={init!r} takes the square root of the scale, which is {scale:g} at {site.name!r}: set alpha above 0"
        )
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return _own(upper[..., :r, :]), _own(q[..., :r])
    if niter := _NITER.fullmatch(init):
        # On the CPU, so that the seed gives the same random start on every device.
        u, s, v = torch.svd_lowrank(weight.cpu(), q=r, niter=int(niter[1]))
        vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[..., :r] / scale).sqrt()
    return _own(root[..., :, None] * vh[..., :r, :]), _own(u[..., :r] * root[..., None, :])


def _own(t: Tensor) -> Tensor:
    return t.to("cpu", torch.get_default_dtype()).clone(memory_format=torch.contiguous_format)
