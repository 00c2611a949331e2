"""Convert an adapter of any weight method to a LoRA that the simplest readers load: one rank, scale 1, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter, WeightAdapter
from lightning_peft.core.adapters.lookup import stacks
from lightning_peft.core.injection.low_rank_factors import evaluating, singular_values
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.formats.directory.files import write_files
from lightning_peft.formats.directory.snapshot import take_snapshot
from lightning_peft.formats.save import adapter_content
from lightning_peft.methods.combine import to_lora

__all__ = ["MERGED", "DeployError", "PlainLoRA", "plain_lora"]

MERGED = "Export the merged model instead (--merged)"


class DeployError(StateError):
    """A model or adapter cannot be exported for the requested software."""


@dataclass
class PlainLoRA:
    """A LoRA with one rank for all weights, and with the scale multiplied into B.

    Attributes:
        config: the content of ``adapter_config.json`` in PEFT's format.
        tensors: PEFT's keys and tensors: A (r, in) and B (out, r) of each weight.
        error: the relative error of the update over all weights, in the Frobenius norm.
        metadata: the metadata of the file of tensors.
        card: the text of the model card.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    error: float
    metadata: dict[str, str]
    card: str

    @property
    def rank(self) -> int:
        """The rank of all factors; smaller ones are padded with zeros."""
        return int(self.config["r"])

    def write(self, directory: Path) -> None:
        """Write the adapter as a directory in PEFT's format."""
        write_files(directory, self.config, self.tensors, self.metadata, self.card)


def plain_lora(
    model: nn.Module,
    name: str,
    target: str,
    max_error: float = 0.01,
    r: int | None = None,
    max_rank: int | None = None,
) -> PlainLoRA:
    """Convert the adapter ``name`` of ``model`` to a plain LoRA. The model is changed in place.

    An adapter that is a low-rank product keeps its rank, and the conversion is exact. Any other update is truncated by
    SVD to the smallest rank whose error is at most ``max_error``.

    Args:
        model: the adapted model, unmerged.
        name: the adapter.
        target: the software that will load the result; for error messages.
        max_error: the largest relative error of the update, in the Frobenius norm over all weights.
        r: the rank of the result; None chooses it.
        max_rank: the largest rank that the software loads; None if it has no limit.

    Raises:
        DeployError: if the adapter changes anything but matrices, or if the error is larger than ``max_error``.
    """
    exact = all(part.low_rank() is not None for part in _parts(model, name))
    try:
        full = max(to_lora(model, name).ranks.values())
    except ValueError as error:
        raise DeployError(f"{target} cannot load {name!r} as a LoRA: {error}. {MERGED}") from error
    spectra = [singular_values(*cast(tuple[Tensor, Tensor], part.low_rank())) for part in _parts(model, name)]
    errors = _errors(spectra, full)
    limit = min(full, max_rank or full)
    within = next((k for k, error in enumerate(errors) if error <= max_error), full)
    rank = max(1, min(r or (full if exact else within), limit))
    if errors[rank] > max_error:
        limited = f", and {target} loads ranks up to {max_rank}" if rank == max_rank else ""
        raise DeployError(
            f"{name!r} as a LoRA of rank {rank} has a relative error of {errors[rank]:.3g}, more than {max_error:g}: "
            f"its update has rank {full}{limited}. Allow this error (--max-error {errors[rank] * 1.01:.2g}), or export "
            "the merged model (--merged)"
        )
    if rank < full:
        to_lora(model, name, r=rank)
    config, tensors, metadata, card = adapter_content(take_snapshot(model, name), fold_scale=True)
    if config["peft_type"] != "LORA":
        raise DeployError(f"{target} cannot load {name!r} as a LoRA: {config['reason']}. {MERGED}")
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return PlainLoRA(config, {k: _padded(k, t, rank) for k, t in tensors.items()}, errors[rank], metadata, card)


def _parts(model: nn.Module, name: str) -> Iterator[WeightAdapter]:
    """The adapters of each weight, in eval mode."""
    for stack in stacks(model).values():
        for adapter in cast(Adapter, stack[name]).components() if name in stack else ():
            with evaluating(adapter):
                yield from adapter.weights().values()


def _errors(spectra: Sequence[Tensor], full: int) -> list[float]:
    """The relative error over all weights for each rank from 0 to ``full``."""
    squares = torch.zeros(full, dtype=torch.float64)
    for values in spectra:
        each = values.double().square().reshape(-1, values.shape[-1]).sum(0).cpu()
        squares[: len(each)] += each
    left = squares.flip(0).cumsum(0).flip(0)
    total = float(left[0]) or 1.0
    return [(float(value) / total) ** 0.5 for value in [*left, torch.tensor(0.0)]]


def _padded(key: str, tensor: Tensor, rank: int) -> Tensor:
    """Pad a factor with zeros to ``rank``; other tensors are returned unchanged."""
    if ".lora_A." in key or key.endswith(".lora_embedding_A"):
        return torch.cat([tensor, tensor.new_zeros(rank - len(tensor), *tensor.shape[1:])])
    if ".lora_B." in key or key.endswith(".lora_embedding_B"):
        missing = tensor.new_zeros(len(tensor), rank - tensor.shape[1], *tensor.shape[2:])
        return torch.cat([tensor, missing], 1)
    return tensor
