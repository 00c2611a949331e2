"""Check that a step with a KV cache computes what the whole sequence without one computes.

An adapter that changes the token sequence or its positions depends on how a model hands over its cache. What it fails
to recognise would change every generated token without an error, so the first call that returns a cache is followed by
three short ones (two tokens, one more from the cache, and both without a cache), and a difference is an error.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.class_swap import original_class
from lightning_peft.core.kv_cache import cache_length, is_cache, states_in

__all__ = ["CacheError", "check_cached_step", "check_texts_do_not_grow"]

# By module, the tokens of this thread's last call without a cache.
_UNCACHED = threading.local()

#: arguments of a call that go with its tokens
_BY_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "token_type_ids")


class CacheError(RuntimeError):
    """A model whose steps with a KV cache cannot be adapted correctly."""


def check_cached_step(
    adapter: Any,
    host: nn.Module,
    run: Callable[..., Any],
    whole: Callable[..., Any],
    output: Any,
    given: dict[str, Any],
    embeds: Callable[[], Tensor],
) -> None:
    """Compare one cached step of an adapted module with the uncached computation, once for each adapter.

    The check runs at the first call in evaluation that returns a cache. It runs again after it failed.

    Args:
        adapter: its ``cache_checked`` remembers that the check has passed.
        host: the adapted module.
        run: calls it with its adapter.
        whole: computes the same without a cache from the embeddings (batch, 2, width) of the first call and
            (batch, 1, width) of the step.
        output: of the call that was just made.
        given: its arguments by name.
        embeds: returns its embeddings, (batch, length, width).

    Raises:
        CacheError: the two differ by more than rounding.
    """
    if adapter.cache_checked or host.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if not states_in(output):
        return
    adapter.cache_checked = True  # the calls of the comparison are not checked themselves
    try:
        _compare(host, run, whole, output, given, embeds)
    except BaseException:
        adapter.cache_checked = False
        raise


def _compare(
    host: nn.Module,
    run: Callable[..., Any],
    whole: Callable[..., Any],
    output: Any,
    given: dict[str, Any],
    embeds: Callable[[], Tensor],
) -> None:
    name = next(iter(states_in(output)))
    rest = {n: v for n, v in given.items() if n not in (*_BY_TOKEN, name, "use_cache", "return_dict")}
    rest = {n: v for n, v in rest.items() if not is_cache(v) and (n.startswith("encoder_") or not _holds_tensor(v))}
    try:
        with torch.no_grad():
            tokens = embeds()
            sample = tokens[:, torch.arange(3, device=tokens.device) % tokens.shape[1]]
            start, step = sample[:, :2], sample[:, 2:]
            first = run(**rest, inputs_embeds=start, use_cache=True)
            before = cache_length(first[name]) if is_cache(first[name]) else 0  # which the step may change in place
            second = run(**rest, inputs_embeds=step, use_cache=True, **{name: first[name]})
            expected = _last(whole(start, step, **rest, use_cache=False))
    except Exception as error:
        warnings.warn(
            f"cannot check whether steps of {original_class(host).__name__} with a KV cache are right: a short call of "
            f"it failed with {type(error).__name__}: {error}. Compare a generation with one of use_cache=False",
            stacklevel=2,
        )
        return
    difference = float((_last(second) - expected).norm() / expected.norm().clamp_min(1e-30))
    grown = cache_length(second[name]) - before if before > 1 else 1
    # Rounding alone may choose another expert of a mixture in half precision.
    allowed = 0.01 if torch.finfo(expected.dtype).bits >= 32 else 0.1
    if difference <= allowed and grown == 1:
        return
    kind = type(first[name]).__name__
    raise CacheError(
        f"a step of {original_class(host).__name__} with the cache {name!r} ({kind}) differs from the computation "
        f"without it by {difference:.1%}, and adds {grown} tokens to the cache: this adapter does not understand how "
        "the model continues from its cache. Call the model with use_cache=False"
    )


def check_texts_do_not_grow(host: nn.Module, real: Tensor, output: Any) -> None:
    """Refuse to generate without a cache with virtual tokens that stand after the text.

    Each call would put them after the tokens generated so far, while a cache keeps them before.

    Args:
        host: the adapted module.
        real: the tokens (batch, length) or embeddings (batch, length, width) of the call that was just made.
        output: of that call.

    Raises:
        CacheError: the call repeats the last one in this thread and adds a token.
    """
    if host.training or states_in(output) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    seen = vars(_UNCACHED).setdefault("seen", weakref.WeakKeyDictionary())
    before, seen[host] = seen.get(host), real.detach()
    if before is None or before.ndim != real.ndim or before.device != real.device:
        return
    start = real[:, :-1]
    if start.shape == before.shape and torch.equal(start, before):
        del seen[host]
        raise CacheError(
            f"{original_class(host).__name__} generates without a KV cache: a call repeats the text of the last one "
            "and adds a token, so that virtual tokens at the end of the text would move behind every generated token. "
            "Pass use_cache=True to generate (the configuration of some models turns it off), or to each call if these "
            "are separate texts"
        )


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


def _last(output: Any) -> Tensor:
    first = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return first[:, -1]
