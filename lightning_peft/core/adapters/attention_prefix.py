"""Add keys and values to the attention calls that a module makes while it runs.

Models compute keys and values in many ways, but most end in ``scaled_dot_product_attention`` or
``multi_head_attention_forward``. A ``TorchFunctionMode`` intercepts these calls while the module runs, whatever name
they were imported under, and adds the prefix. This has three advantages over patching the functions in ``torch``:

* it applies to one thread only, so other replicas and recomputations under gradient checkpointing are unaffected;
* it disables the inference fast path of ``nn.MultiheadAttention``, which would skip the Python call;
* ``torch.compile`` traces it without a graph break.

Hugging Face's "eager" attention calls neither function. It is intercepted through the library's own registry: while
the module runs, its ``config`` selects an attention function of this package, which calls the model's own.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.targeting.attention_sites import EAGER

__all__ = ["AttentionError", "KeysAndValues", "call_with_prefix", "mask_columns"]


#: from this sequence length on, causal attention to a prefix avoids a mask; for shorter sequences, a mask is cheaper
LONG = 256


class AttentionError(RuntimeError):
    """An adapted module computed attention in a way that does not accept a prefix."""


class KeysAndValues(Protocol):
    """The prefix that :func:`call_with_prefix` adds to attention calls."""

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return extended keys and values (..., heads, length, width), and the mask that covers them."""
        ...

    def add(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the new attention output, given the queries, keys and values it was computed from."""
        ...

    @property
    def extends(self) -> bool:
        """Whether :meth:`extend` changes anything."""
        ...


def call_with_prefix(host: Any, prefix: KeysAndValues, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``call(*args, **kwargs)``, the forward of ``host``, with ``prefix`` added to its attention calls.

    Raises:
        AttentionError: if ``host`` did not make an attention call that was intercepted.
    """
    before = getattr(_CALLS, "modes", ())
    outer = _mode(host)
    if outer is not None:  # a second prefix on the same module: the mode that is already active adds both
        outer.prefixes.append(prefix)
        try:
            return call(*args, **kwargs)
        finally:
            outer.prefixes.pop()
    mode = _Mode(prefix)
    eager = getattr(host.__dict__.get("config"), "_attn_implementation", None) == "eager"
    if eager:  # eager attention makes neither call, so it is intercepted through transformers' registry
        _register()
        _route(host, 1)
    # Threads share the host and its config, so "a prefix is active" is recorded per thread.
    _CALLS.modes = (*before, (host, mode))
    try:
        with mode:
            out = call(*args, **kwargs)
    finally:
        _CALLS.modes = before
        if eager:
            _route(host, -1)
    if not mode.calls:  # without this check, the output would silently be that of the base
        raise AttentionError(
            f"{original_class(host).__name__} ran without calling scaled_dot_product_attention, "
            "multi_head_attention_forward or a transformers attention function, so its prefix was not used: exclude "
            "it, or have its forward call torch.nn.functional.scaled_dot_product_attention"
        )
    return out


def mask_columns(mask: Tensor, key: Tensor) -> Tensor:
    """Expand ``mask`` (..., 1 or length) to one column per key (..., length, width).

    Raises:
        AttentionError: if the mask is not a plain tensor.
    """
    # type(), not isinstance: a subclass such as torch's CausalBias has no columns that could be added.
    if type(mask) not in (Tensor, torch.nn.Parameter):
        raise AttentionError(
            f"an attention mask of type {type(mask).__name__} cannot be extended for a prefix: pass a plain tensor, or "
            "exclude the module"
        )
    return mask if mask.shape[-1] == key.shape[-2] else mask.expand(*mask.shape[:-1], key.shape[-2])


class _Mode(TorchFunctionMode):
    def __init__(self, prefix: KeysAndValues) -> None:
        super().__init__()
        self.prefixes = [prefix]
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch disables the mode while this method runs, so _sdpa and _multi_head can call the original functions.
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return _sdpa(self, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            self.calls += 1
            return _multi_head(self, *args, **kwargs)
        return func(*args, **kwargs)

    @property
    def extends(self) -> bool:
        return any(prefix.extends for prefix in self.prefixes)

    def extend(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        for prefix in self.prefixes:
            key, value, mask = prefix.extend(key, value, mask)
        return key, value, mask

    def add(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        for prefix in self.prefixes:
            out = prefix.add(out, query, key, value, scale)
        return out


def _sdpa(
    prefix: KeysAndValues,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if prefix.extends and is_causal and not dropout_p and LONG <= query.shape[-2] == key.shape[-2]:
        keys, values, mask = prefix.extend(key, value, None)
        if mask is None:
            # With extra queries for the prefix, whose outputs are dropped, the flag is correct. A mask would take
            # memory and time quadratic in the length.
            extra = keys.shape[-2] - key.shape[-2]
            longer = F.pad(query, (0, 0, extra, 0))
            out = F.scaled_dot_product_attention(
                longer, keys, values, is_causal=True, scale=scale, enable_gqa=enable_gqa
            )
            return prefix.add(out[..., extra:, :], query, key, value, _scale(query, scale))
    if prefix.extends and is_causal:
        # The flag aligns the causal mask with the upper left corner. With a prefix in front of the keys it would hide
        # the wrong ones, so it is replaced by an explicit mask.
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        is_causal = False
    keys, values, mask = prefix.extend(key, value, attn_mask)
    out = F.scaled_dot_product_attention(
        query, keys, values, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return prefix.add(out, query, key, value, _scale(query, scale))


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _multi_head(
    prefix: KeysAndValues,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` with a prefix; inputs (length, batch, width).

    Reimplemented because the original has no argument for extra keys and values after the projection.
    """
    if static_k is not None or static_v is not None:
        raise AttentionError(
            "multi_head_attention_forward with static_k or static_v does not accept a prefix: exclude this module"
        )
    batched = query.ndim == 3
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    weights: Sequence[Any] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        assert in_weight is not None
        weights = in_weight.chunk(3)
    biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    length, batch, source = q.shape[0], q.shape[1], k.shape[0]
    width = embed_dim // num_heads
    extra = 0  # keys that bias_k and add_zero_attn append to those of the input
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, b.expand(1, batch, embed_dim)]) for t, b in ((k, bias_k), (v, bias_v)))
        extra += 1
    if add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
        extra += 1
    q, k, v = (t.reshape(t.shape[0], batch, num_heads, width).permute(1, 2, 0, 3) for t in (q, k, v))

    mask = _joined_mask(attn_mask, key_padding_mask, q, source)
    if mask is not None and extra:
        mask = F.pad(mask, (0, extra))
    keys, values, mask = prefix.extend(k, v, mask)
    out, attention = _attend(q, keys, values, mask, dropout_p if training else 0.0, need_weights)
    out = prefix.add(out, q, k, v, 1 / math.sqrt(width))
    out = F.linear(out.permute(2, 0, 1, 3).reshape(length, batch, embed_dim), out_weight, out_bias)
    if attention is not None:
        # Return the columns of the user's own keys. They sum to less than 1: the prefix received the rest.
        attention = attention[..., attention.shape[-1] - source - extra :]
        attention = attention.mean(1) if average_attn_weights else attention
    if not batched:
        out, attention = out.squeeze(1), None if attention is None else attention.squeeze(0)
    return out, attention


def _joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, source: int) -> Tensor | None:
    """Combine both masks into one to add to the scores of ``q`` (batch, heads, length, width); None if there is
    none.
    """
    batch, num_heads, length, _ = q.shape
    mask = _additive(attn_mask, q)
    if mask is not None and mask.ndim == 3:
        mask = mask.view(batch, num_heads, length, source)
    padding = _additive(key_padding_mask, q)
    if padding is not None:
        padding = padding.view(batch, 1, 1, source)
        mask = padding if mask is None else mask + padding
    return mask


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout_p: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute attention; return its output, and the attention weights if they are needed."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, keys, values, mask, dropout_p), None
    # scaled_dot_product_attention does not return the weights, so compute them here.
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ keys.transpose(-2, -1)
    attention = (scores if mask is None else scores + mask).softmax(-1)
    attention = F.dropout(attention, dropout_p) if dropout_p else attention
    return attention @ values, attention


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return ``mask`` in additive form; in the boolean masks of nn.MultiheadAttention, True hides a key."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask.bool(), float("-inf"))


# The attention modules that are running in this thread, each with its mode.
_CALLS = threading.local()
_LOCK = threading.Lock()


def _mode(host: object) -> _Mode | None:
    """Return the mode of ``host`` if it is running in this thread, else None."""
    for module, mode in getattr(_CALLS, "modes", ()):
        if module is host:
            return mode
    return None


class _PrefixedConfig:
    """A Hugging Face configuration that selects this package's attention function.

    Everything else is read from the original. Threads that run ``host`` without a prefix also read the original
    attention function, because all threads share the configuration.

    Args:
        host: the module that the configuration belongs to.
        config: the original configuration.
    """

    def __init__(self, host: Any, config: Any) -> None:
        self._host = (host,)
        self._config = config
        self._users = 0

    @property
    def _attn_implementation(self) -> Any:
        return self._config._attn_implementation if _mode(self._host[0]) is None else EAGER

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _route(host: Any, users: int) -> None:
    """Replace the configuration of ``host`` by a :class:`_PrefixedConfig` while any thread is calling it."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace a lock
        return _count(host, users)
    with _LOCK:
        return _count(host, users)


def _count(host: Any, users: int) -> None:
    if not isinstance(host.config, _PrefixedConfig):
        host.config = _PrefixedConfig(host, host.config)
    host.config._users += users
    if host.config._users == 0:
        host.config = host.config._config


def _register() -> None:
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    if EAGER not in functions:
        functions.register(EAGER, _eager)


def _eager(module: Any, *args: Any, **kwargs: Any) -> Any:
    # Every model file of transformers defines its own eager_attention_forward: take it from the forward's module.
    original = inspect.unwrap(original_class(module).forward).__globals__  # type: ignore[attr-defined]
    mode = _mode(module)
    assert mode is not None
    mode.calls += 1
    return _around_eager(mode, functools.partial(original["eager_attention_forward"], module), *args, **kwargs)


def _around_eager(
    prefix: KeysAndValues,
    call: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    keys, values, mask = prefix.extend(key, value, attention_mask)
    if kwargs.get("position_bias") is not None:  # a prefix has no position relative to the queries, so its bias is zero
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (keys.shape[-2] - key.shape[-2], 0))
    out, weights = call(query, keys, values, mask, **kwargs)
    scale = _scale(query, kwargs.get("scaling"))
    heads = out.transpose(1, 2)  # the functions return (batch, length, heads, width)
    out = prefix.add(heads, query, key, value, scale).transpose(1, 2)
    return out, None if weights is None else weights[..., weights.shape[-1] - key.shape[-2] :]
