"""Trained rows of embeddings as PEFT writes them: ``trainable_token_indices``.

``<embedding>.token_adapter.trainable_tokens_delta`` (tokens, dim) holds the new rows, not differences. Of layers that
the model's configuration ties PEFT stores the input embedding's alone; an untied output head has rows of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.sites import Site, weight_sites
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, Options, Tensors
from lightning_peft.formats.peft.targets import heads_of

__all__ = ["TokenEntry", "take_tokens", "write_tokens"]


@dataclass
class TokenEntry:
    """The option and the tensors."""

    config: list[int] | dict[str, list[int]]
    tensors: dict[str, Tensor]


def write_tokens(snapshot: Snapshot) -> TokenEntry | None:
    """The trained rows of ``snapshot``; None where there are none."""
    parts = [part for part in snapshot.adapter_records if "tokens" in part.facts]
    if not parts:
        return None
    facts = snapshot.base.facts()
    entrance, ties = facts["embedding"], facts["tied"]
    embeddings = [part for part in parts if part.kind == "Embedding"]
    ids: dict[str, list[int]] = {}
    tensors = {}
    for part in parts:
        own = part.tensors["rows"]
        if part not in embeddings and ties and any(torch.equal(own, e.tensors["rows"]) for e in embeddings):
            continue  # PEFT gives the rows to what the model's configuration ties
        ids[part.host] = part.facts["tokens"]
        tensors[f"{PREFIX}{part.host}.token_adapter.trainable_tokens_delta"] = own
    return TokenEntry(ids[entrance] if entrance is not None and list(ids) == [entrance] else ids, tensors)


def take_tokens(
    options: Options, tensors: Tensors, base: Base
) -> tuple[list[int] | dict[str, list[int]], dict[str, dict[str, Tensor]]]:
    """``trainable_tokens`` for our method, and the rows by the layer's name.

    Raises:
        FormatError: an embedding that the base does not have; rows missing or misshapen.
    """
    wanted = options.get("trainable_token_indices")
    if not wanted:
        return [], {}
    sites = weight_sites(base.module)
    where = wanted
    if not isinstance(wanted, Mapping):
        entrance = base.facts()["embedding"]
        if entrance is None:
            raise FormatError("trainable_token_indices names no embedding, and the base does not say which is its own")
        where = {entrance: wanted}
    ids: dict[str, list[int]] = {}
    rows: dict[str, dict[str, Tensor]] = {}
    for pattern, tokens in where.items():
        for name in heads_of([pattern], base, "trainable_token_indices"):
            if name not in sites:
                raise FormatError(f"trainable_token_indices: {name!r} is not an embedding or an output head")
            key, order = f"{name}.token_adapter.trainable_tokens_delta", torch.tensor(tokens).argsort()
            if name in rows and not tensors.has(key):
                continue  # tied to one that came before
            own = tensors.take(key, (len(tokens), sites[name].weight.shape[1]))[order]
            if name in rows:
                if not torch.equal(own, rows[name]["rows"]):
                    raise FormatError(f"{key!r} differs from what the file holds for an embedding tied to it")
                continue
            ids[base.patterns([name])[0]] = sorted(tokens)
            rows |= {tied: {"rows": own} for tied in _tied(sites, name)}
    return ids if isinstance(wanted, Mapping) else list(wanted), rows


def _tied(sites: Mapping[str, Site], name: str) -> list[str]:
    return [n for n, s in sites.items() if s.module._parameters.get(s.parameter) is sites[name].weight]
