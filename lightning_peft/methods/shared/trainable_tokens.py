"""Single rows of an embedding or an output head that train: those of new or special tokens.

    W' = W with the rows of some tokens replaced by rows of the adapter's own

n dim parameters for n tokens. The rows start as the embedding's own. Where the embedding is tied to the output head,
the head uses the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.base import WeightAdapter
from lightning_peft.core.adapters.effective_weights import stored_tensor
from lightning_peft.core.names import is_within
from lightning_peft.core.optional import input_embedding
from lightning_peft.core.state.plan import Attachment, Plan
from lightning_peft.core.targeting.base_modules import base_modules
from lightning_peft.core.targeting.layouts import EmbeddingLayout
from lightning_peft.core.targeting.patterns import TargetError, match, no_match
from lightning_peft.core.targeting.sites import Site, weight_sites
from lightning_peft.methods.shared.lora_init import values_of

__all__ = ["TrainableTokens", "as_tokens", "plan_trainable_tokens", "token_embeddings"]


class TrainableTokens(WeightAdapter):
    """``rows`` (tokens, dim): the rows of some tokens, in rising order of their ids.

    Args:
        site: an embedding, or the output head that is tied to one.
        tokens: the ids, rising.
        rows: what to share with the adapter of a tied layer; by default the rows of the weight.
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
    """A list of token ids, or lists of them by pattern, as plain values.

    Raises:
        ValueError: says what was expected.
    """
    lists = list(tokens.values()) if isinstance(tokens, Mapping) else [tokens]
    for ids in lists:
        good = isinstance(ids, Sequence) and not isinstance(ids, str)
        if not good or not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) != len(ids):
            raise ValueError(
                "trainable_tokens must be a list of different token ids (whole numbers from 0 on), or such lists by "
                f"pattern of the embedding, as in {{'embed_tokens': [5, 7]}}; got {tokens!r}"
            )
    if isinstance(tokens, Mapping):
        return {pattern: list(ids) for pattern, ids in tokens.items()}
    return list(tokens)


def plan_trainable_tokens(plan: Plan, model: nn.Module, tokens: Any, default: Any) -> None:
    """Add the rows of ``tokens`` to ``plan``.

    Args:
        plan: of a method; changed in place.
        model: the model.
        tokens: ids in the input embedding, or lists of ids by pattern.
        default: a context in which tensors are made (:meth:`PEFTMethod.seeded_init`), given a name.

    Raises:
        TargetError: no embedding to tell, or a pattern that matches none.
        ValueError: an id beyond the vocabulary; an embedding that the method adapts or trains as well.
    """
    sites = weight_sites(model)
    planned: dict[int, list[int]] = {}  # the ids by weight: of layers that are tied, one brings the others along
    for name, ids in token_embeddings(model, tokens).items():
        if planned.get(id(sites[name].weight)) == sorted(ids):
            continue
        planned[id(sites[name].weight)] = sorted(ids)
        vocabulary = sites[name].weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(f"trainable_tokens: {name!r} has {vocabulary} rows, and no token {max(ids)}")
        rows: nn.Parameter | None = None
        for site in _tied(sites, name):
            if any(a.host == site.host for a in plan.attach) or is_within(site.host, *plan.train_modules):
                raise ValueError(
                    f"{site.name!r} is adapted or trained in full already, and trainable_tokens would train rows of "
                    "it: drop one of them"
                )
            with default(site.name):
                adapter = TrainableTokens(site, sorted(ids), rows)
            rows = adapter.rows
            what = f"{len(ids)} trainable rows" + ("" if site.name == name else f", those of {name}")
            plan.attach.append(Attachment(site.host, site.name, adapter, what))


def token_embeddings(model: nn.Module, tokens: Any) -> dict[str, list[int]]:
    """The embeddings that ``trainable_tokens`` means, by name, with the ids; output heads where a pattern names one.

    Raises:
        TargetError: no embedding to tell, or a pattern that matches none.
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
    """The embedding, and the layers that hold the same weight."""
    weight = sites[name].weight
    yield sites[name]
    yield from (s for n, s in sites.items() if n != name and s.module._parameters.get(s.parameter) is weight)
