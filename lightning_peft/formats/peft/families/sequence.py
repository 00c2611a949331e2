"""Convert prompts and prefixes to and from PEFT's ``peft_type`` PROMPT_TUNING, P_TUNING and PREFIX_TUNING.

The file has one tensor, ``prompt_embeddings``, without a module name: (T, width) for a prompt, and
(T, layers x 2 x width) for prefixes, with each layer's keys before its values. Encoders and projections that computed
them are not saved, only their result.

PEFT puts a prompt before the whole row, including padding; this package puts it before the first token that the
attention mask keeps. The outputs agree except for rows that are padded on the left.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lightning_peft.core.names import is_adapter_key
from lightning_peft.core.optional import config_value
from lightning_peft.core.targeting.attention_sites import find_attention
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.common_options import task_of
from lightning_peft.formats.peft.converter import Converter, NotInPeftError, Options, Reading, Tensors, Writing
from lightning_peft.methods.families.prompt_adapters import PromptAdapter
from lightning_peft.methods.families.sequence import PromptMethod
from lightning_peft.methods.p_tuning import PTuning
from lightning_peft.methods.prefix_tuning import PrefixAdapter, PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning

__all__ = ["PTuningConverter", "PrefixTuningConverter", "PromptTuningConverter"]

#: options that PEFT derives from the base; they are written for it, and ignored in its files
_DERIVED = ("token_dim", "num_attention_heads", "num_layers")
#: options of how a prompt was computed, which do not matter because the file has the result
_MAKING = (
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
)


class _PromptConverter(Converter):
    """The common part of prompt tuning and P-tuning."""

    prefix = "base_model."
    #: the options that only this type has, as this package writes them
    constants: ClassVar[dict[str, str]]

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        method = snapshot.method
        assert isinstance(method, PromptMethod)
        for option, value in (("position", "prefix"), ("template", None), ("side", "encoder"), ("targets", "inputs")):
            if getattr(method, option) != value:
                raise NotInPeftError(
                    f"PEFT always puts the prompt first, and has no counterpart of {option}={getattr(method, option)!r}"
                )
        task, heads = task_of(snapshot.base)
        (adapter,) = _adapters(snapshot, PromptAdapter).values()
        layers = config_value(_config(snapshot.base), "num_hidden_layers")
        if layers is None:
            raise NotInPeftError("PEFT's prompts need num_hidden_layers in the model's configuration")
        _add_heads(snapshot, heads)
        prompt = _without_reparameterization(adapter, snapshot)
        config = _written(task, len(prompt), prompt.shape[1], _heads(snapshot.base), layers)
        return Writing({**config, **self.constants}, {"prompt_embeddings": prompt})

    def make(self, tokens: int, name: str, **common: Any) -> PromptMethod:
        """Return our method with a prompt of ``tokens`` virtual tokens."""
        raise NotImplementedError

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        method = self.make(_count(options), name, **common)
        options.ignore(*_DERIVED, *_MAKING)
        outer, _ = method.find(base.root)
        host: Any = base.root.get_submodule(outer)
        width = host.get_input_embeddings().embedding_dim
        tokens, sides = method.token_template().tokens, options.get("num_transformer_submodules") or 1
        prompt = tensors.take("prompt_embeddings", (None, width), prefix="")
        # For an encoder-decoder, PEFT also stores a prompt for the decoder, but never uses it.
        if len(prompt) != tokens * sides:
            raise FormatError(
                f"'prompt_embeddings' has {len(prompt)} entries, but the options declare {tokens} x {sides} virtual "
                "tokens: they must agree"
            )
        inner = base.inner(outer)
        if inner is None:
            raise FormatError(
                f"the module that takes the tokens, {outer!r}, is outside the base model: load the "
                "adapter onto the base model itself"
            )
        return Reading(method, {inner: {"prompt": prompt[:tokens].clone()}})


class PromptTuningConverter(_PromptConverter):
    """``peft_type`` PROMPT_TUNING."""

    peft_type = "PROMPT_TUNING"
    methods = (PromptTuning,)
    constants: ClassVar[dict[str, str]] = {"prompt_tuning_init": "RANDOM"}

    def make(self, tokens: int, name: str, **common: Any) -> PromptMethod:
        return PromptTuning(tokens, name=name, init="random", **common)


class PTuningConverter(_PromptConverter):
    """``peft_type`` P_TUNING."""

    peft_type = "P_TUNING"
    methods = (PTuning,)
    constants: ClassVar[dict[str, str]] = {"encoder_reparameterization_type": "MLP"}

    def make(self, tokens: int, name: str, **common: Any) -> PromptMethod:
        return PTuning(tokens, name=name, folded_prompt=True, **common)


class PrefixTuningConverter(Converter):
    """``peft_type`` PREFIX_TUNING."""

    peft_type = "PREFIX_TUNING"
    prefix = "base_model."
    methods = (PrefixTuning,)

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        method = snapshot.method
        assert isinstance(method, PrefixTuning)
        if method.gate:
            raise NotInPeftError("PEFT's prefixes have no gate. To save for PEFT, train with gate=False")
        if not method.shift_positions:
            raise NotInPeftError(
                "PEFT counts positions from the end of the prefix. To save for PEFT, train with shift_positions=True"
            )
        (task, heads), adapters = task_of(snapshot.base), _adapters(snapshot, PrefixAdapter)
        everywhere = find_attention(snapshot.base.module, "all-attention", (), method.kv_dim)
        if adapters.keys() != everywhere.keys() or task == "SEQ_2_SEQ_LM":
            raise NotInPeftError("PEFT's prefixes apply to every attention layer of a decoder, and to no other model")
        _add_heads(snapshot, heads)
        parts = [part for adapter in adapters.values() for part in _without_reparameterization(adapter, snapshot)]
        if len({part.shape for part in parts}) > 1:
            raise NotInPeftError("PEFT's prefixes have the same width in all layers, for keys and for values")
        derived = parts[0].shape[1], _heads(snapshot.base, of_keys=True), len(adapters)
        config = {**_written(task, method.num_virtual_tokens, *derived), "prefix_projection": False}
        return Writing(config, {"prompt_embeddings": torch.cat(parts, 1)})

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        options.ignore(*_DERIVED, "encoder_hidden_size", "prefix_projection", "init_weights")
        sites = find_attention(base.module, "all-attention", (), None)
        if options.get("num_transformer_submodules") not in (None, 1):
            raise FormatError("num_transformer_submodules must be 1: prefixes of an encoder-decoder are not supported")
        method = PrefixTuning(
            _count(options),
            targets=base.patterns(sites),
            name=name,
            shift_positions=True,
            **common,
        )
        widths = [width for site in sites.values() for width in (site.key_width, site.value_width)]
        table = tensors.take("prompt_embeddings", (method.num_virtual_tokens, sum(widths)), prefix="")
        parts = [part.clone() for part in table.split(widths, 1)]
        found = {
            site: {"prefix_keys": keys, "prefix_values": values}
            for site, keys, values in zip(sites, parts[::2], parts[1::2])
        }
        return Reading(method, found)


def _adapters(snapshot: Snapshot, kind: type[nn.Module]) -> dict[str, Any]:
    """The method's adapters of class ``kind``, by the name of their host in the base."""
    found = {}
    for part in snapshot.adapter_records:
        host: Any = snapshot.base.module.get_submodule(part.host)
        adapter = host.adapters[snapshot.method.name]
        if isinstance(adapter, kind):
            found[part.host] = adapter
    return found


@torch.no_grad()
def _without_reparameterization(adapter: Any, snapshot: Snapshot) -> Any:
    """The prompt, or the keys and values, that the adapter's network computes in eval mode."""
    mode = adapter.training
    adapter.eval()  # with dropout in its encoder, the saved prompt would be random
    try:
        if isinstance(adapter, PrefixAdapter):
            return [snapshot.take(part) for part in adapter.key_values()]
        return snapshot.take(adapter.virtual())
    finally:
        adapter.train(mode)


def _written(task: str, tokens: int, *derived: int) -> dict[str, Any]:
    """PEFT's options of every prompt and prefix; ``derived`` are the values of ``_DERIVED``."""
    sizes = dict(zip(_DERIVED, derived, strict=True))
    return {"task_type": task, "num_virtual_tokens": tokens, "num_transformer_submodules": 1, **sizes}


def _count(options: Options) -> int:
    """The number of virtual tokens that the options declare."""
    tokens = options.get("num_virtual_tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise FormatError(f"num_virtual_tokens must be an integer of at least 1, got {tokens!r}")
    return tokens


def _add_heads(snapshot: Snapshot, heads: tuple[str, ...]) -> None:
    """Add the head of the task to the snapshot, trained or not: PEFT makes a copy of it and needs its values."""
    for name, module in snapshot.base.modules().items():
        if name.endswith(heads):
            for key, value in module.state_dict().items():
                if not is_adapter_key(key):
                    snapshot.trained.setdefault(f"{name}.{key}", snapshot.take(value))


def _heads(base: Base, of_keys: bool = False) -> int:
    config = _config(base)
    heads = (of_keys and config_value(config, "num_key_value_heads")) or config_value(config, "num_attention_heads")
    if heads is None:
        raise NotInPeftError("PEFT's prompts need num_attention_heads in the model's configuration")
    return heads


def _config(base: Base) -> Any:
    """The base's configuration, or that of its text model if it has several."""
    config: Any = getattr(base.module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
