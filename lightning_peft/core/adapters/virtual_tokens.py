"""Insert virtual tokens into a token sequence, and remove them from a model's outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PerRowTemplate", "TokenLayout", "TokenTemplate", "strip"]


@dataclass(frozen=True)
class TokenTemplate:
    """The positions of virtual tokens relative to the real tokens of a row.

    Attributes:
        slots: (anchor, offset, count) in order: ``count`` virtual tokens placed ``offset`` real tokens after the
            ``"start"`` or before the ``"end"`` of the row.
    """

    slots: tuple[tuple[str, int, int], ...]

    @classmethod
    def parse(cls, template: str) -> TokenTemplate:
        """Parse a template string: ``v3`` is three virtual tokens, ``x1`` one real token, ``x*`` all other real ones.

        Raises:
            ValueError: if the template contains any other word, lacks virtual tokens, or does not contain ``x*``
                exactly once.
        """
        words = template.split()
        if any(not re.fullmatch(r"v[1-9]\d*|x[1-9]\d*|x\*", word) for word in words) or words.count("x*") != 1:
            raise ValueError(
                f"template={template!r}: write v<number> for virtual tokens, x<number> for real ones and x* once, for "
                "all other real ones, as in 'v8 x1 v4 x* v2'"
            )
        rest = words.index("x*")
        slots, seen = [], 0
        for i, word in enumerate(words):
            if word[0] == "v":
                after = sum(int(w[1:]) for w in words[i:] if w[0] == "x" and w != "x*") if i > rest else 0
                slots.append(("end", after, int(word[1:])) if i > rest else ("start", seen, int(word[1:])))
            elif word != "x*":
                seen += int(word[1:])
        if not slots:
            raise ValueError(f"template={template!r} has no virtual tokens: write v<number> where they belong")
        return cls(tuple(slots))

    @property
    def tokens(self) -> int:
        """The number of virtual tokens."""
        return sum(count for _, _, count in self.slots)

    @property
    def follows_end(self) -> bool:
        """Whether some virtual tokens are placed relative to the end, and so move when the text grows."""
        return any(anchor == "end" for anchor, _, _ in self.slots)

    def layout(self, batch: int, length: int, mask: Tensor | None, device: torch.device) -> TokenLayout:
        """Return the layout for rows of ``length`` tokens.

        With a mask (batch, length), a row starts at its first 1 and ends after its last.
        """
        first = torch.zeros(batch, dtype=torch.long, device=device)
        end = torch.full_like(first, length)
        if mask is not None:
            real = mask.bool().int()
            first, end = real.argmax(1), length - real.flip(1).argmax(1)
        columns: list[Tensor] = []
        least = first
        for anchor, offset, count in self.slots:
            # If a row has fewer real tokens than the template names, its virtual tokens are placed at its ends.
            least = torch.minimum(first + offset, end) if anchor == "start" else torch.maximum(end - offset, least)
            columns += [least] * count
        # With a mask, a row may begin with padding, and its virtual tokens come after that.
        ahead = mask is None and self.slots[0] == ("start", 0, self.tokens)
        return TokenLayout(torch.stack(columns, 1), length, first, ahead=ahead)


@dataclass(frozen=True)
class PerRowTemplate:
    """A template for each row of a batch; None for rows without virtual tokens.

    Rows with fewer virtual tokens than others are padded after all their tokens.
    """

    rows: tuple[TokenTemplate | None, ...]

    @property
    def counts(self) -> list[int]:
        """The number of virtual tokens of each row."""
        return [0 if row is None else row.tokens for row in self.rows]

    @property
    def tokens(self) -> int:
        """The largest number of virtual tokens in any row."""
        return max(self.counts)

    @property
    def follows_end(self) -> bool:
        """Whether some virtual tokens are placed relative to the end, and so move when the text grows."""
        return any(row is not None and row.follows_end for row in self.rows)

    @property
    def padded(self) -> bool:
        """Whether rows have different numbers of virtual tokens."""
        return len(set(self.counts)) > 1

    def layout(self, batch: int, length: int, mask: Tensor | None, device: torch.device) -> TokenLayout:
        """Like :meth:`TokenTemplate.layout`, for a batch with the same number of entries per row."""
        before = torch.full((batch, self.tokens), length, device=device)
        row = torch.arange(len(self.rows), device=device).repeat_interleave(batch // len(self.rows))
        first = torch.zeros(batch, dtype=torch.long, device=device)
        for template in dict.fromkeys(p for p in self.rows if p is not None):
            layout = template.layout(batch, length, mask, device)
            theirs = torch.tensor([p == template for p in self.rows], device=device)[row]
            before[:, : template.tokens] = torch.where(theirs[:, None], layout.before, before[:, : template.tokens])
            first = layout.first
        there = torch.arange(self.tokens, device=device) < torch.tensor(self.counts, device=device)[row, None]
        return TokenLayout(before, length, first, there)


class TokenLayout:
    """The position of every virtual and every real token of a batch.

    Args:
        before: (batch, T), the index of the real column that each virtual token is inserted before.
        length: L, the number of real columns.
        first: (batch,), the first column that is not padding.
        there: (batch, T), False for virtual tokens that are padding. By default, none are.
        ahead: True if all virtual tokens are known to come before all real ones in every row. Then insertion is a
            concatenation instead of a gather.
    """

    def __init__(
        self, before: Tensor, length: int, first: Tensor, there: Tensor | None = None, ahead: bool = False
    ) -> None:
        tokens = before.shape[1]
        columns = torch.arange(length, device=before.device)
        virtual = torch.arange(tokens, device=before.device)
        self.before, self.length, self.tokens, self.first, self.ahead = before, length, tokens, first, ahead
        # (batch, L): how many virtual tokens come before each real one
        self.passed = (before[:, None] <= columns[None, :, None]).sum(-1)
        #: (batch, L): positions of the real tokens in the longer sequence
        self.keep = columns + self.passed
        self.there = torch.ones_like(before, dtype=torch.bool) if there is None else there
        #: (batch, L): the last position before the next real token; the output there predicts that token
        self.predicts = columns + ((before[:, None] <= columns[None, :, None] + 1) & self.there[:, None]).sum(-1)
        # For each column of the longer sequence, its index in [real tokens, virtual tokens]: one gather inserts them.
        order = torch.zeros(before.shape[0], length + tokens, dtype=torch.long, device=before.device)
        order = order.scatter(1, self.keep, columns.expand_as(self.keep))
        self.order = order.scatter(1, before + virtual, (length + virtual).expand_as(before))

    def insert(self, x: Tensor, virtual: Tensor) -> Tensor:
        """Insert ``virtual``, (T, ...) for all rows or (rows, T, ...), into ``x`` (batch, L, ...)."""
        batch = self.order.shape[0]
        x, virtual = x.expand(batch, *x.shape[1:]), virtual.to(x.dtype)
        if virtual.ndim < x.ndim:
            virtual = virtual.expand(batch, *virtual.shape)
        elif len(virtual) != batch:
            virtual = virtual.repeat_interleave(batch // len(virtual), 0)
        if self.ahead:
            return torch.cat([virtual, x], 1)
        return take(torch.cat([x, virtual], 1), self.order, 1)

    def mask(self, x: Tensor) -> Tensor:
        """Extend an attention mask (batch, L), with 1 for visible tokens, by the virtual tokens."""
        return self.insert(x, self.there)

    def fill(self, x: Tensor, value: float) -> Tensor:
        """Insert ``value`` into ``x`` (batch, L) at the virtual positions."""
        return self.insert(x, x.new_full((self.tokens,), value))

    def positions(self, positions: Tensor) -> Tensor:
        """Extend position ids by the virtual tokens.

        Args:
            positions: (batch, L), or (axes, batch, L) for rotary positions with several axes.
        """
        if positions.ndim == 3:
            return torch.stack([self.positions(axis) for axis in positions])
        positions = positions.expand(self.order.shape[0], -1)
        # A virtual token gets the position after the real token before it, or that of the first real token.
        previous = positions.gather(1, (self.before - 1).clamp(min=0)) + 1
        start = positions.gather(1, self.first[:, None].clamp(max=self.length - 1))
        virtual = torch.where(self.before > self.first[:, None], previous, start)
        virtual = virtual + torch.arange(self.tokens, device=positions.device)
        return torch.cat([positions + self.passed, virtual], 1).gather(1, self.order)

    def square(self, mask: Tensor) -> Tensor:
        """Extend an (L, L) mask by the virtual tokens.

        The mask is boolean (True hides a key from a query) or is added to the scores. A virtual token sees, and is
        visible to, the same tokens as the real token before it, so it does not leak information from later tokens. A
        virtual token before all real tokens is visible to every token and sees what the first real token sees.
        """
        row = (self.before[0] - 1).clamp(min=0)
        zero = mask.new_zeros(())
        right = torch.where(self.before[0] > 0, mask[:, row], zero)
        wide = torch.cat([mask, right], 1)
        wide = torch.cat([wide, wide[row]], 0)
        # All virtual tokens see one another.
        virtual = torch.arange(len(wide), device=mask.device) >= self.length
        wide = torch.where(virtual[:, None] & virtual, zero, wide)
        return wide[self.order[0]][:, self.order[0]]


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Return the entries of ``x`` at ``index`` (batch, n) along ``dim``."""
    if dim == 1:  # unlike gather, index_select does not keep x for backward
        first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        return x.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, tuple(index.shape))
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    size = list(x.shape)
    size[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(size))


def strip(output: Any, layout: TokenLayout, predicting: bool = False, names: Sequence[str] = ()) -> Any:
    """Remove the virtual positions from a model's output.

    Args:
        output: a tensor, tuple, list or mapping (such as Hugging Face's outputs). Tensors (batch, length, ...) and
            attention tensors (batch, heads, length, length) in it are shortened, including those one level down.
        layout: the positions of the virtual tokens.
        predicting: in the first entry, keep the positions that predict the next real token instead of the real tokens'
            own positions.
        names: if not empty, the entries of a mapping to shorten.
    """
    if isinstance(output, Tensor):
        return _strip(output, layout, layout.predicts if predicting else layout.keep)
    if isinstance(output, dict):
        for i, (name, value) in enumerate(list(output.items())):
            if not names or name in names:
                output[name] = _entry(value, layout, predicting and i == _first(output))
        return output
    return type(output)(_entry(v, layout, predicting and i == 0) for i, v in enumerate(output))


def _first(output: dict) -> int:
    return 1 if next(iter(output)) == "loss" else 0


def _entry(value: Any, layout: TokenLayout, predicting: bool) -> Any:
    if isinstance(value, Tensor):
        return _strip(value, layout, layout.predicts if predicting else layout.keep)
    if type(value) in (tuple, list):
        return type(value)(_strip(v, layout, layout.keep) if isinstance(v, Tensor) else v for v in value)
    return value


def _strip(x: Tensor, layout: TokenLayout, index: Tensor) -> Tensor:
    whole = layout.length + layout.tokens
    if x.ndim == 4:
        for dim in (2, 3):
            x = take(x, index, dim) if x.shape[dim] == whole else x
        return x
    if x.ndim != 3 or x.shape[1] != whole:
        return x
    return x[:, layout.tokens :] if layout.ahead else take(x, index, 1)
