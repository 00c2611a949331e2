"""Generate many texts at once, each with its own adapter; a text joins the batch when it arrives, and leaves when it is
complete.

Texts that run together form a batch with one key-value cache (:mod:`~lightning_peft.serving.joined_cache`). One step
gives every text its next token. New texts are first run by themselves, as one batch, and then joined with the others.
Texts whose cache cannot be joined (virtual tokens, sliding windows, recurrent states) run one by one.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.kv_cache import is_cache
from lightning_peft.serving.joined_cache import can_join, join, select
from lightning_peft.serving.rows_context import RowsContext
from lightning_peft.serving.sequence import GeneratedText, Sampling

__all__ = ["Generator"]

_LOG = logging.getLogger(__name__)


@dataclass
class _Batch:
    """Texts that run together.

    Attributes:
        texts: one for each row.
        cache: the KV cache of all their tokens except the last one.
        mask: (rows, length of the cache), 1 for visible tokens.
        joins: whether other texts can join.
    """

    texts: list[GeneratedText]
    cache: Any
    mask: Tensor
    joins: bool


class Generator:
    """Generates texts with a causal language model of transformers.

    Args:
        network: the model.
        context: the :class:`RowsContext` of the module that holds its adapters.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, network: Any, context: RowsContext, tokenizer: Any) -> None:
        self.network, self.tokenizer, self._context = network, tokenizer, context
        self._takes = inspect.signature(network.forward).parameters.keys()
        self._waiting: list[GeneratedText] = []
        self._batches: list[_Batch] = []
        self._joins: dict[str | None, bool] = {}  # whether caches can be joined, by adapter; known after its first text
        self._cache_name = ""
        ends = network.generation_config.eos_token_id
        self.end = frozenset([ends] if isinstance(ends, int) else ends or ())
        config = network.config.get_text_config(decoder=True)
        #: the maximum number of tokens of a prompt with its text; None if the configuration does not have it
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        self._can_join = self._check_joined()

    def __len__(self) -> int:
        return len(self._waiting) + sum(len(batch.texts) for batch in self._batches)

    def new(self, prompt: Sequence[int], adapter: str | None, sampling: Sampling, seed: int | None) -> GeneratedText:
        """Return a new text, of which no token is generated yet."""
        return GeneratedText(prompt, adapter, replace(sampling, seed=seed), self.tokenizer, self.end)

    def add(self, text: GeneratedText) -> None:
        """Add a text; the next :meth:`step` gives it its first token."""
        self._waiting.append(text)

    def clear(self) -> None:
        """Drop all texts."""
        self._waiting, self._batches = [], []

    def remove(self, text: GeneratedText) -> None:
        """Drop a text whose client has disconnected."""
        text.finish = "cancelled"
        self._waiting = [other for other in self._waiting if other is not text]

    @torch.inference_mode()
    def step(self) -> list[tuple[GeneratedText, str]]:
        """Give each text its next token, and return the new part of each.

        A text that has ended has its ``finish`` set, and is not part of the next step.
        """
        self._drop_ended()
        new: list[tuple[GeneratedText, str]] = []
        for batch in self._batches:
            last = torch.tensor([[t.tokens[-1]] for t in batch.texts], device=batch.mask.device)
            mask = torch.cat([batch.mask, batch.mask.new_ones(len(last), 1)], 1)
            logits, batch.cache = self._run(batch.texts, last, mask, batch.cache)
            batch.mask = mask
            new += [(text, text.add(row)) for text, row in zip(batch.texts, logits)]
        waiting, self._waiting = self._waiting, []
        for texts in self._grouped(waiting):
            batch, logits = self._start(texts)
            self._batches.append(batch)
            new += [(text, text.add(row)) for text, row in zip(texts, logits)]
        self._drop_ended()
        self._join()
        return new

    def _grouped(self, texts: list[GeneratedText]) -> list[list[GeneratedText]]:
        """Split new texts into the batches of their first run.

        A text runs alone if its cache cannot be joined, or if its adapter is new and this is not known yet.
        """
        together = [text for text in texts if self._joins.get(text.adapter)]
        alone = [[text] for text in texts if not self._joins.get(text.adapter)]
        return [together, *alone] if together else alone

    def _start(self, texts: list[GeneratedText]) -> tuple[_Batch, Tensor]:
        """Run the prompts of new texts. Returns the batch, and the logits (rows, vocabulary) of their first tokens."""
        length = max(len(text.prompt) for text in texts)
        pad = self.tokenizer.pad_token_id or 0
        ids = [[pad] * (length - len(t.prompt)) + t.prompt for t in texts]
        real = [[0] * (length - len(t.prompt)) + [1] * len(t.prompt) for t in texts]
        mask = torch.tensor(real, device=self.network.device)
        logits, cache = self._run(texts, torch.tensor(ids, device=mask.device), mask, None)
        joins = self._can_join and can_join(cache, length)
        if len(self._joins) > 10_000:  # forget adapters that were deleted since
            self._joins.clear()
        self._joins.setdefault(texts[0].adapter, joins)
        return _Batch(texts, cache, mask, joins), logits

    def _run(self, texts: Sequence[GeneratedText], ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        self._context.enter([text.adapter for text in texts])
        return self._forward(ids, mask, cache)

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Run new tokens (rows, new) after a cache; return the logits (rows, vocabulary) of the last, and the cache."""
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True, "return_dict": True}
        if "position_ids" in self._takes:
            # Count visible tokens only: rows are padded on the left, and padding must not shift their positions.
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Only the last logits are used, and those of a whole prompt would take much memory.
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        if cache is not None:
            given[self._cache_name] = cache
        output = self.network(**given)
        # Models name their cache differently; the argument has the name of the output.
        self._cache_name = next(name for name, value in output.items() if is_cache(value))
        return output.logits[:, -1], output[self._cache_name]

    def _drop_ended(self) -> None:
        for batch in self._batches:
            rows = [i for i, text in enumerate(batch.texts) if text.finish is None]
            if rows and len(rows) < len(batch.texts):
                batch.cache, batch.mask = select(batch.cache, batch.mask, rows)
            batch.texts = [batch.texts[i] for i in rows]
        self._batches = [batch for batch in self._batches if batch.texts]

    def _join(self) -> None:
        joining = [batch for batch in self._batches if batch.joins]
        if len(joining) < 2:
            return
        cache, mask = join([batch.cache for batch in joining], [batch.mask for batch in joining])
        whole = _Batch([text for batch in joining for text in batch.texts], cache, mask, True)
        self._batches = [whole, *(batch for batch in self._batches if not batch.joins)]

    @torch.inference_mode()
    def _check_joined(self) -> bool:
        """Whether two joined texts of different lengths continue as each does alone; called before serving starts."""
        tokens = torch.arange(6, device=self.network.device) % self.network.get_input_embeddings().num_embeddings
        prompts: list[Tensor] = [tokens[None, :5], tokens[None, :3]]
        step = tokens[None, 5:]

        def started(ids: Tensor) -> tuple[Tensor, Any]:
            mask = torch.ones_like(ids)
            return mask, self._forward(ids, mask, None)[1]

        def continued(mask: Tensor, cache: Any) -> Tensor:
            ones = mask.new_ones(len(mask), 1)
            return self._forward(step.expand(len(mask), 1), torch.cat([mask, ones], 1), cache)[0]

        self._context.enter([None])
        alone = torch.cat([continued(*started(ids)) for ids in prompts])
        parts = [started(ids) for ids in prompts]
        if not all(can_join(cache, mask.shape[1]) for mask, cache in parts):
            _LOG.info("the caches of %s cannot be joined: texts run one by one", type(self.network).__name__)
            return False
        self._context.enter([None, None])
        cache, mask = join([c for _, c in parts], [m for m, _ in parts])
        joined = continued(mask, cache)
        allowed = 0.01 if torch.finfo(alone.dtype).bits >= 32 else 0.1
        if float((joined - alone).norm() / alone.norm().clamp_min(1e-30)) <= allowed:
            return True
        _LOG.warning("%s gives different outputs in a padded batch: texts run one by one", type(self.network).__name__)
        return False
