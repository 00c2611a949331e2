"""Check that generating from a KV cache gives the same result as processing the whole sequence.

An adapter that changes the token sequence or its positions depends on how a model passes its cache on. If it does not
recognise the cache, every generated token is wrong, without an error. Therefore the first call that returns a cache is
followed by three short ones: two tokens, a third token from their cache, and all three without a cache. If the last two
differ, an error is raised.
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

# The tokens of this thread's last call without a cache, by module.
_UNCACHED = threading.local()

#: arguments that have one value per token; the short calls below leave them out
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
    """Compare one step from a cache with the same computation without a cache, once per adapter.

    The check runs after the first call in evaluation that returns a cache, and again after every failed check.

    Args:
        adapter: the adapter of ``host``; its ``cache_checked`` is set when the check passes.
        host: the adapted module.
        run: calls ``host`` with its adapter.
        whole: computes the same without a cache, from the embeddings of the first two tokens (batch, 2, width) and of
            the third (batch, 1, width).
        output: the output of the call that triggered the check.
        given: the arguments of that call, by name.
        embeds: returns the embeddings of that call, (batch, length, width).

    Raises:
        CacheError: if the two results differ by more than rounding.
    """
    if adapter.cache_checked or host.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    name, cache = next(iter(states_in(output).items()), ("", None))
    if not name:
        return
    adapter.cache_checked = True  # the short calls below are not checked themselves
    kind = original_class(host).__name__
    try:
        with torch.no_grad():
            cached, expected, grown = _short_calls(run, whole, embeds(), name, _other_arguments(given, name))
    except Exception as error:
        warnings.warn(
            f"cannot check that {kind} generates correctly from its KV cache: a short test call failed with "
            f"{type(error).__name__}: {error}. Compare a generated text with one generated with use_cache=False",
            stacklevel=2,
        )
        return
    except BaseException:  # interrupted, so nothing is known yet
        adapter.cache_checked = False
        raise
    adapter.cache_checked = False
    difference = float((cached - expected).norm() / expected.norm().clamp_min(1e-30))
    # In half precision, rounding alone may route a token to another expert of a mixture.
    allowed = 0.01 if torch.finfo(expected.dtype).bits >= 32 else 0.1
    adapter.cache_checked = difference <= allowed and grown == 1
    if adapter.cache_checked:
        return
    raise CacheError(
        f"a step of {kind} with the cache {name!r} ({type(cache).__name__}) differs from the computation without it by "
        f"{difference:.1%}, and adds {grown} tokens to the cache: the adapter does not support this model's cache. "
        "Call the model with use_cache=False"
    )


def _other_arguments(given: dict[str, Any], cache: str) -> dict[str, Any]:
    """Return the arguments that the short calls share with the call ``given``: no caches, and no values per token."""
    left = {n: v for n, v in given.items() if n not in (*_BY_TOKEN, cache, "use_cache", "return_dict")}
    # A tensor with an unknown name may have values per token as well, unless it belongs to the encoder's text.
    return {n: v for n, v in left.items() if not is_cache(v) and (n.startswith("encoder_") or not _holds_tensor(v))}


def _short_calls(
    run: Callable[..., Any], whole: Callable[..., Any], tokens: Tensor, name: str, rest: dict[str, Any]
) -> tuple[Tensor, Tensor, int]:
    """Return the output for a third token from the cache of two, the same without a cache, and the cache's growth."""
    sample = tokens[:, torch.arange(3, device=tokens.device) % tokens.shape[1]]  # a shorter text is repeated
    start, step = sample[:, :2], sample[:, 2:]
    first = run(**rest, inputs_embeds=start, use_cache=True)
    before = cache_length(first[name]) if is_cache(first[name]) else 0  # now, as the step may extend it in place
    second = run(**rest, inputs_embeds=step, use_cache=True, **{name: first[name]})
    expected = whole(start, step, **rest, use_cache=False)
    # A recurrent state does not count tokens: its length is 1 as soon as it is filled.
    grown = cache_length(second[name]) - before if before > 1 else 1
    return _last(second), _last(expected), grown


def check_texts_do_not_grow(host: nn.Module, real: Tensor, output: Any) -> None:
    """Raise an error if a model generates without a cache although its virtual tokens follow the text.

    Without a cache, each call would insert them after the tokens generated so far; with one, they stay before these
    tokens.

    Args:
        host: the adapted module.
        real: the tokens (batch, length) or embeddings (batch, length, width) of the call that was just made.
        output: the output of that call.

    Raises:
        CacheError: if the call repeats the tokens of this thread's last call and adds one.
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
            f"{original_class(host).__name__} generates without a KV cache: a call repeats the tokens of the last one "
            "and adds one, so virtual tokens that follow the text would move behind every generated token. Pass "
            "use_cache=True to generate (some model configurations disable it); if these are separate texts, pass it "
            "to each call"
        )


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


def _last(output: Any) -> Tensor:
    first = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return first[:, -1]
