"""Prefixes for a batch whose rows use different adapters, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.attention_prefix import call_with_prefix, mask_columns
from lightning_peft.core.batching.batched import BatchedAdapters
from lightning_peft.core.batching.layout import RowError, assemble, take
from lightning_peft.methods.shared.prefix_window import prefix_in_window

__all__ = ["BatchedPrefixes"]


class BatchedPrefixes(BatchedAdapters):
    """The prefix of each row, padded on the left to the longest one; the attention mask hides the padding."""

    def run(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        extending = [None if a is None or not a.extends else a for a in self.adapters]
        windows, longest = [a and a.window for a in extending], max(a.tokens if a else 0 for a in extending)
        prefix = prefix_in_window(self, windows, longest, host, (*args, *kwargs.values()))
        return call_with_prefix(host, prefix, call, *args, **kwargs)

    @property
    def extends(self) -> bool:
        return any(adapter.extends for adapter, _ in self.groups)

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.extends:
            return key, value, mask
        self._check(key)
        lengths = [0 if a is None or not a.extends else a.tokens for a in self.adapters]
        longest = max(lengths)
        if min(lengths) < longest or mask is not None:
            mask = self._widened(mask, key, lengths)
        joined = [(adapter.key_values(), adapter, rows) for adapter, rows in self.groups if adapter.extends]
        rest = tuple(i for i, length in enumerate(lengths) if not length)
        longer = []
        for i, own in enumerate((key, value)):
            pieces: list[tuple[tuple[int, ...], Tensor]] = []
            for prefix, adapter, rows in joined:
                laid_out = adapter.by_head(prefix[i], take(own, 0, rows, self.n))
                pieces.append((rows, F.pad(laid_out, (0, 0, longest - adapter.tokens, 0))))
            if rest:
                none = take(own, 0, rest, self.n)
                pieces.append((rest, none.new_zeros(*none.shape[:-2], longest, none.shape[-1])))
            longer.append(torch.cat([assemble(pieces, 0), own], -2))
        return longer[0], longer[1], mask

    def _widened(self, mask: Tensor | None, key: Tensor, lengths: list[int]) -> Tensor:
        columns = torch.arange(max(lengths), device=key.device)
        seen = columns >= max(lengths) - torch.tensor(lengths, device=key.device)[:, None]
        seen = seen.repeat_interleave(len(key) // self.n, 0).view(len(key), *[1] * (key.ndim - 2), -1)
        if mask is None:
            mask = key.new_zeros([1] * (key.ndim - 1) + [key.shape[-2]])
        mask = mask_columns(mask, key)
        mask = mask.view([1] * (key.ndim - mask.ndim) + list(mask.shape)).expand(len(key), *[-1] * (key.ndim - 1))
        seen = seen.expand(*mask.shape[:-1], -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, float("-inf"))
        return torch.cat([seen, mask], -1)

    def add(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if all(adapter.extends for adapter, _ in self.groups):
            return out
        self._check(out)
        whole = (out, query, key, value)
        pieces: list[tuple[tuple[int, ...], Tensor]] = []
        for adapter, rows in self.groups:
            o, q, k, v = (take(t, 0, rows, self.n) for t in whole)
            pieces.append((rows, adapter.add(o, q, k, v, scale)))
        if rest := tuple(i for i in range(self.n) if self.adapters[i] is None):
            pieces.append((rest, take(out, 0, rest, self.n)))
        return assemble(pieces, 0)

    def _check(self, t: Tensor) -> None:
        if len(t) % self.n:
            raise RowError(
                f"{self.batch_layout} runs attention on a batch of {len(t)}, which is not a multiple of the {self.n} "
                "names: pass one name per row"
            )
