"""Adapters around an encoder-decoder whose encoder has virtual tokens: they adjust its masks and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.virtual_tokens import PerRowTemplate, TokenTemplate, strip
from lightning_peft.core.batching.layout import BatchLayout
from lightning_peft.core.module_io import by_name
from lightning_peft.methods.families.prompt_adapters import PromptAdapter, batched_template

__all__ = ["PromptMask", "PromptStrip"]


class _AroundEncoder(Adapter):
    """Knows the positions of the encoder's virtual tokens."""

    unscalable = PromptAdapter.unscalable

    def __init__(self, token_template: TokenTemplate | PerRowTemplate) -> None:
        super().__init__()
        self.token_template = token_template


class PromptMask(_AroundEncoder):
    """Runs around a decoder: extends its mask of the encoder's states by the encoder's virtual tokens."""

    def run(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(host, args, kwargs)
        mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is None and states is not None and getattr(self.token_template, "padded", False):
            mask = torch.ones(len(states), states.shape[1] - self.token_template.tokens, device=states.device)
        if mask is not None and states is not None and states.shape[1] == mask.shape[1] + self.token_template.tokens:
            layout = self.token_template.layout(len(mask), mask.shape[1], mask, mask.device)
            given["encoder_attention_mask"] = layout.mask(mask)
        return call(**given)

    def batched_class(self, host: nn.Module) -> Any:
        return batched_masks


class PromptStrip(_AroundEncoder):
    """Runs around an encoder-decoder: removes the virtual positions from the encoder's states in its output."""

    names = ("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "cross_attentions")

    def run(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(host, args, kwargs)
        out = call(*args, **kwargs)
        states = out.get("encoder_last_hidden_state") if isinstance(out, dict) else None
        if states is None:
            return out
        length = states.shape[1] - self.token_template.tokens
        layout = self.token_template.layout(states.shape[0], length, given.get("attention_mask"), states.device)
        return strip(out, layout, names=self.names)

    def batched_class(self, host: nn.Module) -> Any:
        return batched_strip


def batched_masks(batch_layout: BatchLayout, adapters: Sequence[PromptMask | None]) -> PromptMask:
    """A :class:`PromptMask` for a batch whose rows use different prompts."""
    return PromptMask(batched_template(adapters))


def batched_strip(batch_layout: BatchLayout, adapters: Sequence[PromptStrip | None]) -> PromptStrip:
    """A :class:`PromptStrip` for a batch whose rows use different prompts."""
    return PromptStrip(batched_template(adapters))
