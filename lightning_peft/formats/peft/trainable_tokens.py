"""Convert trained embedding entries to and from PEFT's ``trainable_token_indices``.

Despite its name, ``<embedding>.token_adapter.trainable_tokens_delta`` (tokens, dim) holds the new vectors, not
differences. If the model's configuration ties the output head to the input embedding, PEFT stores only the vectors of
the embedding. An untied output head has its own vectors.
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
    """The value of ``trainable_token_indices``, and the tensors by PEFT's full keys."""

    config: list[int] | dict[str, list[int]]
    tensors: dict[str, Tensor]


def write_tokens(snapshot: Snapshot) -> TokenEntry | None:
    """The trained embedding entries of ``snapshot``; None if it has none."""
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
            continue  # PEFT itself copies the vectors to a layer that the model's configuration ties
        ids[part.host] = part.facts["tokens"]
        tensors[f"{PREFIX}{part.host}.token_adapter.trainable_tokens_delta"] = own
    return TokenEntry(ids[entrance] if entrance is not None and list(ids) == [entrance] else ids, tensors)


def take_tokens(
    options: Options, tensors: Tensors, base: Base
) -> tuple[list[int] | dict[str, list[int]], dict[str, dict[str, Tensor]]]:
    """Return ``trainable_tokens`` for our method, and the trained vectors by the layer's name.

    Raises:
        FormatError: if the base does not have the embedding, or vectors are missing or misshapen.
    """
    wanted = options.get("trainable_token_indices")
    if not wanted:
        return [], {}
    sites = weight_sites(base.module)
    where = wanted
    if not isinstance(wanted, Mapping):
        entrance = base.facts()["embedding"]
        if entrance is None:
            raise FormatError(
                "trainable_token_indices names no embedding, and the base has no get_input_embeddings(): write it as "
                "{embedding: [ids]}"
            )
        where = {entrance: wanted}
    ids: dict[str, list[int]] = {}
    rows: dict[str, dict[str, Tensor]] = {}
    for pattern, tokens in where.items():
        for name in heads_of([pattern], base, "trainable_token_indices"):
            if name not in sites:
                raise FormatError(f"trainable_token_indices: {name!r} is not an embedding or an output head")
            key, order = f"{name}.token_adapter.trainable_tokens_delta", torch.tensor(tokens).argsort()
            if name in rows and not tensors.has(key):
                continue  # tied to an embedding that was already read
            own = tensors.take(key, (len(tokens), sites[name].weight.shape[1]))[order]
            if name in rows:
                if not torch.equal(own, rows[name]["rows"]):
                    raise FormatError(
                        f"{key!r} has other values than the file has for an embedding that is tied to it, but tied "
                        "layers can have only one: untie them in the model first"
                    )
                continue
            ids[base.patterns([name])[0]] = sorted(tokens)
            rows |= {tied: {"rows": own} for tied in _tied(sites, name)}
    return ids if isinstance(wanted, Mapping) else list(wanted), rows


def _tied(sites: Mapping[str, Site], name: str) -> list[str]:
    return [n for n, s in sites.items() if s.module._parameters.get(s.parameter) is sites[name].weight]
