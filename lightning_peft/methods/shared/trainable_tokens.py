"""Train the vectors of chosen tokens, such as new or special ones, in an embedding and its tied output head.

    W' = W with the vectors of the chosen tokens replaced by trained ones

It trains n dim parameters for n tokens. The vectors start as copies of those in the base. If the output head is tied to
the embedding, it uses the same trained vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.effective_weights import base_tensor
from lightning_peft.core.names import is_within
from lightning_peft.core.optional import input_embedding
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.computed_weights import stored_tensor
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.core.targeting.sites import Site, weight_sites
from lightning_peft.methods.shared.lora_init import values_of

__all__ = ["TrainableTokens", "as_tokens", "plan_trainable_tokens", "token_embeddings"]


class TrainableTokens(WeightAdapter):
    """Trained vectors ``rows`` (tokens, dim) for chosen tokens, in ascending order of their ids.

    Args:
        site: an embedding, or the output head that is tied to one.
        tokens: the token ids, in ascending order.
        rows: the ``rows`` of the adapter of a tied layer, to share them; by default copies of the weight's vectors.
    """

    needs_its_tokens = True
    ids: Tensor

    def __init__(self, site: Site, tokens: Sequence[int], rows: nn.Parameter | None = None) -> None:
        super().__init__(site)
        self.tokens = list(tokens)
        self.looked_up = isinstance(site.layout, EmbeddingLayout)
        self.register_buffer("ids", torch.tensor(self.tokens), persistent=False)
        if rows is None:
            weight = values_of(site, "trainable_tokens")
            chosen = (weight.t() if self.looked_up else weight)[self.ids.to(weight.device)]
            rows = nn.Parameter(chosen.to("cpu", torch.get_default_dtype()).clone())
        self.rows = rows

    def transform(self, weight: Tensor) -> Tensor:
        rows = self.rows.to(weight.dtype)
        return weight.index_copy(1, self.ids, rows.t()) if self.looked_up else weight.index_copy(0, self.ids, rows)

    def neutral_values(self, host: nn.Module) -> Mapping[str, Tensor | float]:
        stored = base_tensor(host, self.parameter)
        assert stored is not None
        matrix = self.layout.matrix(stored)
        return {"rows": (matrix.t() if self.looked_up else matrix)[self.ids]}

    def output(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rows = self.rows.to(y.dtype)
        if self.looked_up:
            at = torch.searchsorted(self.ids, x).clamp_max(len(self.tokens) - 1)
            return torch.where((self.ids[at] == x)[..., None], rows[at], y)
        bias = stored_tensor(host, "bias")
        return y.index_copy(-1, self.ids, F.linear(x, rows.to(x.dtype), None if bias is None else bias[self.ids]).to(y))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens if len(self.tokens) < 9 else len(self.tokens)}"


def as_tokens(tokens: Any) -> list[int] | dict[str, list[int]]:
    """Convert ``trainable_tokens`` to plain values: a list of token ids, or a dict of such lists by pattern.

    Raises:
        ValueError: if it is neither, or an id is negative or repeated.
    """
    lists = list(tokens.values()) if isinstance(tokens, Mapping) else [tokens]
    for ids in lists:
        good = isinstance(ids, Sequence) and not isinstance(ids, str)
        if not good or not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) != len(ids):
            raise ValueError(
                "trainable_tokens must be a list of different token ids (integers of at least 0), or a dict of such "
                f"lists by pattern, as in {{'embed_tokens': [5, 7]}}; got {tokens!r}"
            )
    if isinstance(tokens, Mapping):
        return {pattern: list(ids) for pattern, ids in tokens.items()}
    return list(tokens)


def plan_trainable_tokens(plan: Plan, model: nn.Module, tokens: Any, default: Any) -> None:
    """Add adapters that train the vectors of ``tokens`` to ``plan``.

    Args:
        plan: the plan of a method; changed in place.
        model: the model.
        tokens: ids for the input embedding, or lists of ids by pattern of the embedding.
        default: returns the context for initialising the adapter of a given name (:meth:`PEFTMethod.seeded_init`).

    Raises:
        TargetError: if the embedding cannot be determined, or a pattern matches none.
        ValueError: if an id is beyond the vocabulary, or the method also adapts or trains the embedding.
    """
    sites = weight_sites(model)
    planned: dict[int, list[int]] = {}  # the ids by weight: adapting one of several tied layers adapts the others too
    for name, ids in token_embeddings(model, tokens).items():
        if planned.get(id(sites[name].weight)) == sorted(ids):
            continue
        planned[id(sites[name].weight)] = sorted(ids)
        vocabulary = sites[name].weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(
                f"trainable_tokens: {name!r} has {vocabulary} entries, so token {max(ids)} does not "
                f"exist: use ids below {vocabulary}, or resize the embedding first"
            )
        rows: nn.Parameter | None = None
        for site in _tied(sites, name):
            if any(a.host == site.host for a in plan.attach) or is_within(site.host, *plan.train_modules):
                raise ValueError(
                    f"{site.name!r} is already adapted or trained in full, so trainable_tokens cannot train single "
                    "tokens of it: remove one of the two"
                )
            with default(site.name):
                adapter = TrainableTokens(site, sorted(ids), rows)
            rows = adapter.rows
            what = f"{len(ids)} trainable tokens" + ("" if site.name == name else f", those of {name}")
            plan.attach.append(Attachment(site.host, site.name, adapter, what))


def token_embeddings(model: nn.Module, tokens: Any) -> dict[str, list[int]]:
    """The ids of ``trainable_tokens`` by the name of the embedding, or of the output head if a pattern matches one.

    Raises:
        TargetError: if the embedding cannot be determined, or a pattern matches none.
    """
    embeddings = {n: m for n, m in base_modules(model) if isinstance(m, nn.Embedding)}
    if not isinstance(tokens, Mapping):
        return {_input_embedding(model, embeddings): list(tokens)} if tokens else {}
    found: dict[str, list[int]] = {}
    heads = {n: m for n, m in base_modules(model) if isinstance(m, nn.Linear)}
    for pattern, ids in tokens.items():
        hits = [n for n, m in embeddings.items() if match(pattern, n, m)]
        hits = hits or [n for n, m in heads.items() if match(pattern, n, m)]
        if not hits:
            raise TargetError(f"trainable_tokens: {no_match(pattern, embeddings)}")
        found |= {name: list(ids) for name in hits}
    return found


def _input_embedding(model: nn.Module, embeddings: Mapping[str, nn.Module]) -> str:
    names = {id(module): name for name, module in embeddings.items()}
    for _, module in base_modules(model):
        if (embedding := input_embedding(module)) is not None and id(embedding) in names:
            return names[id(embedding)]
    if len(embeddings) != 1:
        raise TargetError(
            f"trainable_tokens: the model has {list(embeddings) or 'no embeddings'}; name one, as in "
            f"trainable_tokens={{{next(iter(embeddings), 'embedding')!r}: [...]}}"
        )
    return next(iter(embeddings))


def _tied(sites: Mapping[str, Site], name: str) -> Iterator[Site]:
    """The embedding, then the layers tied to it."""
    weight = sites[name].weight
    yield sites[name]
    yield from (s for n, s in sites.items() if n != name and s.module._parameters.get(s.parameter) is weight)
