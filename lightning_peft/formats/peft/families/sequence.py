"""Methods of the token sequence as PEFT writes them: ``peft_type`` PROMPT_TUNING, P_TUNING and PREFIX_TUNING.

One tensor, ``prompt_embeddings``, without a module's name: (T, width) of prompts; (T, layers x 2 x width) of prefixes,
each layer's keys before its values. What made them (an encoder, a projection) is folded into them.

PEFT puts a prompt before all of a row, padding included; ours stands before what the attention mask keeps. The two
agree but for rows that are padded on the left.
"""

from __future__ import annotations

from typing import Any

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

#: what PEFT derives from the base
_DERIVED = ("token_dim", "num_attention_heads", "num_layers")
#: what made a prompt, which is in the file as it came out
_MAKING = (
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
)


class _PromptConverter(Converter):
    """What prompt tuning and P-tuning have in common."""

    prefix = "base_model."

    def write(self, snapshot: Snapshot, **options: Any) -> Writing:
        method = snapshot.method
        assert isinstance(method, PromptMethod)
        for option, value in (("position", "prefix"), ("template", None), ("side", "encoder"), ("targets", "inputs")):
            if getattr(method, option) != value:
                raise NotInPeftError(f"PEFT puts a prompt first, not by {option}={getattr(method, option)!r}")
        task, heads = task_of(snapshot.base)
        (adapter,) = _adapters(snapshot, PromptAdapter).values()
        layers = config_value(_config(snapshot.base), "num_hidden_layers")
        if layers is None:
            raise NotInPeftError("PEFT's prompts need a model whose configuration counts its layers")
        _add_heads(snapshot, heads)
        prompt = _without_reparameterization(adapter, snapshot)
        config = {
            "task_type": task,
            "num_virtual_tokens": len(prompt),
            "token_dim": prompt.shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": _heads(snapshot.base),
            "num_layers": layers,
        }
        return Writing({**config, **self.own()}, {"prompt_embeddings": prompt})

    def own(self) -> dict[str, Any]:
        """The options of this kind alone."""
        return {}

    def make(self, tokens: int, name: str, **common: Any) -> PromptMethod:
        """Our method with a prompt of so many tokens."""
        raise NotImplementedError

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        method = self.make(_count(options), name, **common)
        options.ignore(*_DERIVED, *_MAKING)
        outer, _ = method.find(base.root)
        host: Any = base.root.get_submodule(outer)
        width = host.get_input_embeddings().embedding_dim
        tokens, sides = method.token_template().tokens, options.get("num_transformer_submodules") or 1
        prompt = tensors.take("prompt_embeddings", (None, width), prefix="")
        # Of an encoder-decoder PEFT stores a decoder's prompt too, and never uses it.
        if len(prompt) != tokens * sides:
            raise FormatError(
                f"'prompt_embeddings' has {len(prompt)} rows; {tokens} x {sides} virtual tokens are declared"
            )
        inner = base.inner(outer)
        if inner is None:
            raise FormatError(f"the module that takes the tokens, {outer!r}, is not in the base")
        return Reading(method, {inner: {"prompt": prompt[:tokens].clone()}})


class PromptTuningConverter(_PromptConverter):
    """``peft_type`` PROMPT_TUNING."""

    peft_type = "PROMPT_TUNING"
    methods = (PromptTuning,)

    def own(self) -> dict[str, Any]:
        return {"prompt_tuning_init": "RANDOM"}

    def make(self, tokens: int, name: str, **common: Any) -> PromptMethod:
        return PromptTuning(tokens, name=name, init="random", **common)


class PTuningConverter(_PromptConverter):
    """``peft_type`` P_TUNING."""

    peft_type = "P_TUNING"
    methods = (PTuning,)

    def own(self) -> dict[str, Any]:
        return {"encoder_reparameterization_type": "MLP"}

    def make(self, tokens: int, name: str, **common: Any) -> PromptMethod:
        return PTuning(tokens, name=name, folded_prompt=True, **common)


class PrefixTuningConverter(Converter):
    """``peft_type`` PREFIX_TUNING."""

    peft_type = "PREFIX_TUNING"
    prefix = "base_model."
    methods = (PrefixTuning,)

    def write(self, snapshot: Snapshot, **options: Any) -> Writing:
        method = snapshot.method
        assert isinstance(method, PrefixTuning)
        if method.gate:
            raise NotInPeftError("PEFT's prefixes have no gate. Train with gate=False for PEFT to read it")
        if not method.shift_positions:
            raise NotInPeftError(
                "PEFT counts positions from the end of the prefix. Train with shift_positions=True for PEFT to read it"
            )
        (task, heads), adapters = task_of(snapshot.base), _adapters(snapshot, PrefixAdapter)
        everywhere = find_attention(snapshot.base.module, "all-attention", (), method.kv_dim)
        if adapters.keys() != everywhere.keys() or task == "SEQ_2_SEQ_LM":
            raise NotInPeftError("PEFT's prefixes are those of every attention of a decoder")
        _add_heads(snapshot, heads)
        parts = [part for adapter in adapters.values() for part in _without_reparameterization(adapter, snapshot)]
        if len({part.shape for part in parts}) > 1:
            raise NotInPeftError("PEFT's prefixes have one width in all layers, for keys and for values")
        config = {
            "task_type": task,
            "num_virtual_tokens": method.num_virtual_tokens,
            "token_dim": parts[0].shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": _heads(snapshot.base, of_keys=True),
            "num_layers": len(adapters),
            "prefix_projection": False,
        }
        return Writing(config, {"prompt_embeddings": torch.cat(parts, 1)})

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        options.ignore(*_DERIVED, "encoder_hidden_size", "prefix_projection", "init_weights")
        sites = find_attention(base.module, "all-attention", (), None)
        if options.get("num_transformer_submodules") not in (None, 1):
            raise FormatError("num_transformer_submodules=2: prefixes of an encoder-decoder are not supported")
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
    """The method's adapters of a kind, by their hosts in the base."""
    found = {}
    for part in snapshot.adapter_records:
        host: Any = snapshot.base.module.get_submodule(part.host)
        adapter = host.adapters[snapshot.method.name]
        if isinstance(adapter, kind):
            found[part.host] = adapter
    return found


@torch.no_grad()
def _without_reparameterization(adapter: Any, snapshot: Snapshot) -> Any:
    """What an adapter's network makes, as it does after training: a prompt, or keys and values."""
    mode = adapter.training
    adapter.eval()
    try:
        if isinstance(adapter, PrefixAdapter):
            return [snapshot.take(part) for part in adapter.key_values()]
        return snapshot.take(adapter.virtual())
    finally:
        adapter.train(mode)


def _count(options: Options) -> int:
    """How many virtual tokens there are."""
    tokens = options.get("num_virtual_tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise FormatError(f"num_virtual_tokens must be an integer of at least 1, got {tokens!r}")
    return tokens


def _add_heads(snapshot: Snapshot, heads: tuple[str, ...]) -> None:
    """Let the head of a task be written, trained or not: PEFT makes a copy of it and wants its values."""
    for name, module in snapshot.base.modules().items():
        if name.endswith(heads):
            for key, value in module.state_dict().items():
                if not is_adapter_key(key):
                    snapshot.trained.setdefault(f"{name}.{key}", snapshot.take(value))


def _heads(base: Base, of_keys: bool = False) -> int:
    config = _config(base)
    heads = (of_keys and config_value(config, "num_key_value_heads")) or config_value(config, "num_attention_heads")
    if heads is None:
        raise NotInPeftError("PEFT's prompts need a model whose configuration counts its attention heads")
    return heads


def _config(base: Base) -> Any:
    """The base's configuration; of its text model, where it has several."""
    config: Any = getattr(base.module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
