"""Adapters that insert virtual tokens into a module's token sequence, and remove them from its output.

Two kinds of module can carry a prompt:

* a module that takes ``input_ids`` and ``inputs_embeds`` and has ``get_input_embeddings``, as the inner models of
  Hugging Face do: ``LlamaModel``, ``BertModel``, an encoder or decoder stack. Masks, position ids, token types, the KV
  cache and the labels of the enclosing causal model are extended accordingly;
* any module whose first argument is a sequence (batch, length, width) and that returns one, such as an
  ``nn.TransformerEncoder`` or a ``Sequential`` of blocks. Masks are recognised by name: ``attention_mask`` (1 keeps a
  token), ``key_padding_mask`` and ``src_key_padding_mask`` (True hides a token), ``mask``, ``src_mask`` and
  ``attn_mask`` (length, length; True hides). Virtual tokens get no position embedding, and padding is ignored when they
  are placed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.virtual_tokens import PerRowTemplate, TokenLayout, TokenTemplate, strip
from lightning_peft.core.batching.batched import BatchedAdapters
from lightning_peft.core.batching.layout import BatchLayout, row_dim
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.kv_cache import cache_length, filled_cache, is_cache
from lightning_peft.core.module_io import by_name, parameters_of
from lightning_peft.methods.shared.cached_step import check_cached_step, check_texts_do_not_grow

__all__ = ["PromptAdapter", "PromptLabels", "TokenError", "batched_template"]


class TokenError(RuntimeError):
    """Virtual tokens cannot be inserted into the sequence of this call."""


_PADDING = ("key_padding_mask", "src_key_padding_mask")
_SQUARE = ("mask", "src_mask", "attn_mask")
# The prompts whose virtual tokens stay in the output of the calls that this thread is running; set by PromptLabels.
_CALLS = threading.local()


def _kept(prompt: nn.Module) -> bool:
    return any(kept is prompt for kept in getattr(_CALLS, "kept", ()))


class PromptAdapter(Adapter):
    """The virtual tokens of one module: a parameter ``prompt`` (T, width), or an ``encoder`` that computes them.

    Args:
        prompt: initial values (T, width), or a module that returns the tokens.
        token_template: the positions of the virtual tokens.
        limit: number of positions in the host's position table; None without a table.
        shorten: remove them from the output; False for an encoder, whose decoder attends to them.
        causal: whether the output at a token predicts the next token.
        batch_first: whether sequences are (batch, length, width) instead of (length, batch, width).
    """

    misfit_errors = (TokenError,)
    unscalable = (
        "virtual tokens are part of the sequence, and a fraction of a token is not defined. Train a method that "
        "changes weights or activations, or use fewer tokens"
    )

    def __init__(
        self,
        prompt: Tensor | nn.Module,
        token_template: TokenTemplate,
        limit: int | None = None,
        shorten: bool = True,
        causal: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(prompt, nn.Module):
            self.encoder: nn.Module | None = prompt
        else:
            self.encoder = None
            self.prompt = nn.Parameter(prompt)
        self.token_template = token_template
        self.limit = limit
        self.shorten = shorten
        self.causal = causal
        self.batch_first = batch_first
        self.cache_checked = False

    def virtual(self) -> Tensor:
        """The virtual tokens' embeddings, (T, width)."""
        return self.prompt if self.encoder is None else self.encoder()

    @property
    def has_reparameterization(self) -> bool:
        return self.encoder is not None

    def remove_reparameterization(self) -> None:
        prompt = self.virtual().clone()
        self.encoder = None
        self.prompt = nn.Parameter(prompt)

    def run(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(host, args, kwargs)
        if given.get("input_ids") is None and given.get("inputs_embeds") is None:
            return self._around_sequence(host, call, given)
        return self._around_tokens(host, call, given)

    def _around_tokens(self, host: Any, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        embeds, ids, mask = (given.get(n) for n in ("inputs_embeds", "input_ids", "attention_mask"))
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise TokenError(
                f"{_kind(host)} got an attention mask that is not (batch, length), so virtual tokens cannot be added "
                "to it. Pass the padding mask itself (and generate without a static cache)"
            )
        tokens = self.token_template.tokens
        if filled_cache(given.values()) is not None:  # the virtual tokens are already in the cache
            return call(**self._continued(host, given))
        if embeds is None:
            embeds = host.get_input_embeddings()(ids)
        batch, length = embeds.shape[:2]
        if self.limit is not None and length + tokens > self.limit:
            raise TokenError(
                f"{length} tokens and {tokens} virtual tokens exceed the {self.limit} positions of {_kind(host)}: "
                f"truncate inputs to {self.limit - tokens} tokens"
            )
        mask = self._mask(host, mask, embeds)
        layout, real = self.token_template.layout(batch, length, mask, embeds.device), embeds
        given["input_ids"], given["inputs_embeds"] = None, layout.insert(embeds, self.virtual())
        if mask is not None:
            given["attention_mask"] = layout.mask(mask)
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = layout.fill(given["token_type_ids"], 0)
        if given.get("position_ids") is not None:
            given["position_ids"] = layout.positions(given["position_ids"])
        if given.get("cache_position") is not None:
            given["cache_position"] = torch.arange(length + tokens, device=embeds.device)
        out = call(**{n: v for n, v in given.items() if n != "input_ids" or "input_ids" in parameters_of(host)})
        if self.causal and self.token_template.follows_end:
            check_texts_do_not_grow(host, embeds if ids is None else ids, out)
        self._note(layout, given, out)
        self._check_cache(host, call, given, real, out)
        return strip(out, layout, self.causal) if self.shorten and not _kept(self) else out

    def _continued(self, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Adjust the arguments of a call whose cache already holds the virtual tokens."""
        mask, tokens = given.get("attention_mask"), self.token_template.tokens
        if mask is not None:
            start = TokenTemplate((("start", 0, tokens),)).layout(len(mask), mask.shape[1], mask, mask.device)
            given["attention_mask"] = start.mask(mask)
        for name in ("position_ids", "cache_position"):
            if given.get(name) is not None:
                given[name] = given[name] + tokens
        return given

    def _mask(self, host: Any, mask: Tensor | None, embeds: Tensor) -> Tensor | None:
        """The mask (batch, length) of the real tokens."""
        return mask

    def _note(self, layout: TokenLayout, given: dict[str, Any], out: Any) -> None:
        """Remember the layout for later calls with the same cache; only batches of different prompts need it."""

    def _check_cache(self, host: Any, call: Callable[..., Any], given: dict[str, Any], real: Tensor, out: Any) -> None:
        """Check once that a step from the cache in ``out`` is correct."""
        if self.limit is not None and self.limit < self.token_template.tokens + 3:
            return

        # Insert the virtual tokens around ``start`` only: in the cached run, they were placed before ``step`` was
        # known.
        def whole(start: Tensor, step: Tensor, **rest: Any) -> Any:
            layout = self.token_template.layout(len(start), 2, None, start.device)
            return call(inputs_embeds=torch.cat([layout.insert(start, self.virtual()), step], 1), **rest)

        def run(**given: Any) -> Any:
            return self._around_tokens(host, call, given)

        check_cached_step(self, host, run, whole, out, given, lambda: real)

    def _around_sequence(self, host: Any, call: Callable[..., Any], given: dict[str, Any]) -> Any:
        first, x = next(iter(given.items()), ("", None))
        if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise TokenError(
                f"the first argument of {_kind(host)} is {got}, but a prompt needs embeddings (batch, length, width): "
                "name in targets a module that takes them"
            )
        x = x if self.batch_first else x.transpose(0, 1)
        batch, length = x.shape[:2]
        layout = self.token_template.layout(batch, length, None, x.device)
        for name, value in list(given.items())[1:]:
            if not isinstance(value, Tensor):
                continue
            if name == "attention_mask" and value.ndim == 2:
                given[name] = layout.mask(value)
            elif name in _PADDING:
                given[name] = layout.fill(value, 0)
            elif name in _SQUARE and value.ndim == 2:
                given[name] = layout.square(value)
                if given.get("is_causal") is not None:
                    given["is_causal"] = False  # a hint that the mask is triangular, which is no longer true
            elif length in value.shape:
                raise TokenError(
                    f"{_kind(host)} got {name} of shape {tuple(value.shape)}, to which virtual tokens cannot be added: "
                    f"only attention_mask, {', '.join(_PADDING)} (batch, length) and {', '.join(_SQUARE)} (length, "
                    "length) are supported. Pass the mask under one of these names, or none"
                )
        longer = layout.insert(x, self.virtual())
        given[first] = longer if self.batch_first else longer.transpose(0, 1)
        positional = [given.pop(first)]
        out = call(*positional, **given)
        if not self.batch_first:
            return strip(out.transpose(0, 1), layout, self.causal).transpose(0, 1)
        return strip(out, layout, self.causal)

    def batched_class(self, host: nn.Module) -> Callable[..., BatchedAdapters] | None:
        # Other modules have no padding mask that could hide the padding of shorter prompts.
        return BatchedPrompts if "inputs_embeds" in parameters_of(host) else None

    def extra_repr(self) -> str:
        return f"tokens={self.token_template.tokens}, slots={self.token_template.slots}"


class BatchedPrompts(BatchedAdapters, PromptAdapter):
    """The prompts of each row, padded to the longest one; the attention mask hides the padding."""

    def __init__(self, batch_layout: BatchLayout, adapters: Sequence[PromptAdapter | None]) -> None:
        nn.Module.__init__(self)
        BatchedAdapters.__init__(self, batch_layout, adapters)
        self.token_template: Any = batched_template(self.adapters)
        prompts = [adapter for adapter, _ in self.groups]
        self.limit = min((p.limit for p in prompts if p.limit is not None), default=None)
        self.causal = any(p.causal for p in prompts)

    run = PromptAdapter.run

    @property
    def shorten(self) -> bool:  # type: ignore[override]
        # PromptLabels removes them instead
        return all(adapter.shorten and not _kept(adapter) for adapter, _ in self.groups)

    def virtual(self) -> Tensor:
        """The virtual tokens' embeddings, (rows, T, width)."""
        tokens = self.token_template.tokens
        made = {a: F.pad(v, (0, 0, 0, tokens - len(v))) for a, _ in self.groups for v in [a.virtual()]}
        none = torch.zeros_like(next(iter(made.values())))
        return torch.stack([none if a is None else made[a] for a in self.adapters])

    def _mask(self, host: Any, mask: Tensor | None, embeds: Tensor) -> Tensor | None:
        if len(embeds) % self.n:
            row_dim(self.batch_layout, embeds, self.n)  # raises an error that names the sizes
        if mask is not None or not self.token_template.padded:
            return mask
        if "attention_mask" not in parameters_of(host):
            raise TokenError(
                f"{_kind(host)} does not take attention_mask, so rows with fewer virtual tokens than others cannot be "
                "padded: use prompts of the same length in all rows"
            )
        return torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def _note(self, layout: TokenLayout, given: dict[str, Any], out: Any) -> None:
        values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else ()
        # On the cache itself: later calls bring it back, and the layout is freed with it.
        for cache in (v for v in (*given.values(), *values) if is_cache(v) and hasattr(v, "__dict__")):
            vars(cache).setdefault("_peft_layouts", {})[self._key()] = layout

    def _check_cache(self, host: Any, call: Callable[..., Any], given: dict[str, Any], real: Tensor, out: Any) -> None:
        self.groups[0][0]._check_cache(host, call, given, real, out)

    def _key(self) -> tuple[int, ...]:
        return tuple(map(id, self.adapters))

    def _continued(self, host: Any, given: dict[str, Any]) -> dict[str, Any]:
        cache, mask = filled_cache(given.values()), given.get("attention_mask")
        embeds = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        layout = getattr(cache, "_peft_layouts", {}).get(self._key())
        if layout is None or len(layout.there) != len(embeds):
            raise TokenError(
                f"{_kind(host)} got a KV cache that was filled with the virtual tokens of other adapters: run the "
                f"whole generation inside one lp.rows, starting from an empty cache"
            )
        # A row with fewer virtual tokens has padding in the cache, which must not count in its positions.
        missing = (~layout.there).sum(1, keepdim=True)
        past, new = cache_length(cache), embeds.shape[1]
        if mask is None and self.token_template.padded:
            mask = torch.ones(len(embeds), past + new - layout.tokens, dtype=torch.long, device=embeds.device)
        if mask is not None:
            start, later = mask[:, : layout.length], mask[:, layout.length :]
            given["attention_mask"] = torch.cat([layout.mask(start), later], 1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + layout.tokens - missing
        elif self.token_template.padded:
            if "position_ids" not in parameters_of(host):
                raise TokenError(
                    f"{_kind(host)} does not take position_ids, so rows with different numbers of virtual tokens "
                    "cannot continue from one KV cache: call it with use_cache=False, or use prompts of the same "
                    "length in all rows"
                )
            given["position_ids"] = past + torch.arange(new, device=embeds.device) - missing
        if given.get("cache_position") is not None:
            given["cache_position"] = given["cache_position"] + layout.tokens
        return given


class PromptLabels(Adapter):
    """Runs around a causal language model: sets its labels to -100 at virtual positions.

    The inner model keeps the virtual positions in its output during this call, so that the last virtual token predicts
    the first real token and this prediction counts in the loss.
    """

    unscalable = PromptAdapter.unscalable

    def __init__(self, *prompts: PromptAdapter, token_template: Any = None) -> None:
        super().__init__()
        self._prompts = prompts  # a tuple, so that they are not registered as submodules a second time
        self.token_template = prompts[0].token_template if token_template is None else token_template

    def run(self, host: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = by_name(host, args, kwargs)
        labels = given.get("labels")
        if labels is None or filled_cache(given.values()) is not None:
            return call(*args, **kwargs)
        layout = self.token_template.layout(len(labels), labels.shape[1], given.get("attention_mask"), labels.device)
        given["labels"] = layout.fill(labels, -100)
        # The model computes its loss inside ``call``, from logits that must be as long as the labels. So the prompts of
        # the inner model leave their positions in, and they are removed below. Per thread, because others may run the
        # same model without labels.
        before = getattr(_CALLS, "kept", ())
        _CALLS.kept = (*before, *self._prompts)
        try:
            out = call(**given)
        finally:
            _CALLS.kept = before
        if isinstance(out, dict):
            # Logits are taken where the next real token is predicted, states where the real tokens are.
            strip(out, layout, True, ("logits",))
            return strip(out, layout, False, ("hidden_states", "attentions"))
        loss, *rest = out
        return (loss, *strip(tuple(rest), layout, True))

    def batched_class(self, host: nn.Module) -> Any:
        return batched_labels


def batched_template(adapters: Sequence[Any]) -> PerRowTemplate:
    """The positions of the virtual tokens of each row."""
    return PerRowTemplate(tuple(None if adapter is None else adapter.token_template for adapter in adapters))


def batched_labels(batch_layout: BatchLayout, adapters: Sequence[PromptLabels | None]) -> PromptLabels:
    """A :class:`PromptLabels` for a batch whose rows use different prompts."""
    prompts = {prompt: None for a in adapters if a is not None for prompt in a._prompts}
    return PromptLabels(*prompts, token_template=batched_template(adapters))


def _kind(module: nn.Module) -> str:
    return original_class(module).__name__
