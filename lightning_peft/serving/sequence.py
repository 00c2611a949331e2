"""One text that is being generated: choose its next token, detect its end, and return the part that is final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["GeneratedText", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """The options for choosing tokens. By default, the most likely token is chosen.

    Attributes:
        max_tokens: the maximum number of tokens to generate.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the most likely tokens whose probabilities sum to this.
        top_k: sample from this number of most likely tokens; 0 for all.
        seed: the seed of the text's own random generator, so that other texts of the batch do not change its draws.
        stop: strings that end the text; they are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class GeneratedText:
    """The state of one generated text.

    Args:
        prompt: token ids.
        adapter: the internal name of its adapter; None for the base.
        sampling: how to choose tokens.
        tokenizer: the model's tokenizer.
        end: the ids of the tokens that end a text.
    """

    def __init__(
        self, prompt: Sequence[int], adapter: str | None, sampling: Sampling, tokenizer: Any, end: frozenset[int]
    ) -> None:
        self.prompt, self.adapter, self.sampling = list(prompt), adapter, sampling
        self.tokens: list[int] = []
        #: why the text has ended: ``"stop"`` (by itself or by a stop string) or ``"length"``; None while it grows
        self.finish: str | None = None
        self._tokenizer, self._end = tokenizer, end
        self._shown = 0  # how many characters of the text have been returned
        self._draws = torch.Generator()
        if sampling.seed is None:
            self._draws.seed()
        else:
            self._draws.manual_seed(sampling.seed)

    def add(self, logits: Tensor) -> str:
        """Choose the next token from ``logits`` (vocabulary), and return the new text that is final.

        A part that may still change is held back: an incomplete character, or the possible start of a stop string.
        """
        token = self._choose(logits)
        if token in self._end:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            if len(self.tokens) >= self.sampling.max_tokens:
                self.finish = "length"
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        cuts = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.finish, text = "stop", text[: min(cuts)]
        elif self.finish is None:
            text = text[: len(text) - self._may_change(text)]
        new = text[self._shown :]
        self._shown += len(new)
        return new

    def _choose(self, logits: Tensor) -> int:
        options = self.sampling
        if options.temperature == 0:
            return int(logits.argmax())
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        scores = TemperatureLogitsWarper(float(options.temperature))(None, logits.float()[None].cpu())
        if options.top_k:
            scores = TopKLogitsWarper(options.top_k)(None, scores)
        if options.top_p < 1:
            scores = TopPLogitsWarper(options.top_p)(None, scores)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._draws))

    def _may_change(self, text: str) -> int:
        """The number of characters at the end of ``text`` that may still change when further tokens come."""
        if text.endswith("\ufffd"):  # the first bytes of a character
            return len(text) - len(text.rstrip("\ufffd"))
        return max((_overlap(text, stop) for stop in self.sampling.stop), default=0)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
