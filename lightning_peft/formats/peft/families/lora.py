"""Convert LoRA and DoRA to and from PEFT's ``peft_type`` LORA; ``lora_tensors.py`` converts the tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_peft.core.names import owner_of
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.patterns import no_match
from lightning_peft.core.targeting.sites import weight_sites
from lightning_peft.core.targeting.ties import tied_names
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.base_values import bias_option
from lightning_peft.formats.peft.converter import Converter, Options, Reading, Tensors, Writing
from lightning_peft.formats.peft.families.lora_tensors import (
    entries,
    take_attention,
    take_layer,
    take_parameter,
    within_rank,
)
from lightning_peft.formats.peft.older_layouts import check_not_renamed
from lightning_peft.formats.peft.option_table import Option, flag, read_options, written_options
from lightning_peft.formats.peft.patterns import RankOptions, clean, rank_arguments
from lightning_peft.formats.peft.targets import parameters_of, resolve, target_modules, target_parameters
from lightning_peft.formats.peft.trainable_tokens import take_tokens, write_tokens
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.lora import LoRA

__all__ = ["TRAINING_OPTIONS", "LoRAConverter"]

_RANKS = RankOptions("lora_alpha")
_TABLE = (Option("lora_dropout", 0.0, "dropout"), Option("use_rslora", False))


class LoRAConverter(Converter):
    """``peft_type`` LORA."""

    peft_type = "LORA"
    methods = (LoRA, DoRA)

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        method = snapshot.method
        assert isinstance(method, LoRA)
        found = list(entries([part for part in snapshot.adapter_records if "tokens" not in part.facts], fold_scale))
        rslora = method.use_rslora and not fold_scale
        ranks = {entry.name: (entry.r, clean(entry.scale * _divisor(entry.r, rslora))) for entry in found}
        modules = [entry.name for entry in found if not entry.is_parameter]
        parameters = [entry.name for entry in found if entry.is_parameter]
        config = {
            **_RANKS.written(ranks),
            **written_options(_TABLE, method),
            "use_rslora": rslora,
            "use_dora": isinstance(method, DoRA),
            "fan_in_fan_out": any(part.kind == "Conv1D" for part in snapshot.adapter_records),
            "init_lora_weights": True,
            "target_modules": target_modules(modules, snapshot.base),
            "bias": bias_option(snapshot, modules),
        }
        if method.lora_bias:
            config["lora_bias"] = True
        if parameters:
            config["target_parameters"] = target_parameters(parameters, snapshot.base)
        check_not_renamed(config["target_modules"], snapshot.base)
        tensors = {key: value for entry in found for key, value in entry.tensors.items()}
        if rows := write_tokens(snapshot):
            config["trainable_token_indices"] = rows.config
        return Writing(config, tensors | (rows.tensors if rows else {}), wrapped=modules)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        _check(options)
        dora, given = flag(options, "use_dora"), read_options(_TABLE, options)
        rslora = given["use_rslora"]
        pairs = _pairs(options, tensors, base, dora, rslora)
        sizes = {site: pair["lora_A"].shape[-2] for site, (pair, _) in pairs.items()}
        ranks = {site: (r, clean(pairs[site][1] * _divisor(r, rslora))) for site, r in sizes.items()}
        if not _support_dropout(pairs, base):
            given["dropout"] = 0.0  # dropout has no effect on a loaded, frozen adapter
        init = options.get("init_lora_weights", True)
        tokens, rows = take_tokens(options, tensors, base)
        method = (DoRA if dora else LoRA)(
            targets=base.patterns(pairs),
            name=name,
            **rank_arguments(ranks, base),
            **given,
            bias=options.get("bias", "none"),
            lora_bias=any("lora_bias" in pair for pair, _ in pairs.values()),
            init=init if init in _FROM_WEIGHT else "kaiming",
            trainable_tokens=tokens,
            **common,
        )
        return Reading(method, {site: pair for site, (pair, _) in pairs.items()} | rows)


#: PEFT options that change LoRA's output and are not supported here -> the value with which they have no effect
_REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
#: options that do not change the output: only training, sharding or PEFT's bookkeeping uses them. fan_in_fan_out is
#: ignored because the layer's class determines its storage
TRAINING_OPTIONS = (
    *("megatron_config", "megatron_core", "runtime_config", "fan_in_fan_out", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
#: initialisations that do not change the base
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: initialisations that subtract a part from the base weight; the part is the same each time, so it can be repeated
_FROM_WEIGHT = ("pissa", "olora")


def _check(options: Options) -> None:
    """Refuse options with which the output would differ from PEFT's.

    Raises:
        FormatError: if there is one.
    """
    options.refuse(**_REFUSED)
    options.ignore(*TRAINING_OPTIONS)
    if options.get("bias", "none") not in ("none", "lora_only", "all"):
        raise FormatError(f"bias must be 'none', 'lora_only' or 'all', got {options.get('bias')!r}")
    init = options.get("init_lora_weights", True)
    if init not in (*_PLAIN_INITS, *_FROM_WEIGHT):
        raise FormatError(
            f"init_lora_weights={init!r} changed the base weights, and the change cannot be repeated here: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which converts it to plain LoRA"
        )


def _pairs(
    options: Options, tensors: Tensors, base: Base, dora: bool, rslora: bool
) -> dict[str, tuple[dict[str, Tensor], float]]:
    """Our tensors and the scale of their product, by the weight's name."""
    sites = weight_sites(base.module)
    ranks = _RANKS.read(options)
    lora_bias = bool(options.get("lora_bias", False))

    def at(name: str) -> tuple[int, float]:
        rank, alpha = ranks.at(name)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise FormatError(f"the rank of {name!r} must be an integer of at least 1, got {rank!r}")
        return rank, alpha / _divisor(rank, rslora)

    found: dict[str, tuple[dict[str, Tensor], float]] = {}
    names = resolve(options, base)
    if options.get("ensure_weight_tying"):  # PEFT then also adapts layers tied to a target, without naming them
        tied = tied_names(base.module)
        others = [owner_of(o) for name in names for o in tied.get(f"{name}.weight", ())]
        names = list(dict.fromkeys([*names, *others]))
    for name in names:
        rank, scale = at(name)
        if isinstance(base.module.get_submodule(name), nn.MultiheadAttention):
            both = take_attention(tensors, name, sites, rank)
            found |= {site: (pair, scale) for site, pair in both.items()}
        elif name in sites:
            found[name] = take_layer(tensors, sites[name], rank, dora, lora_bias), scale
        else:
            raise FormatError(f"target_modules: {no_match(name, {n: site.module for n, site in sites.items()})}")
    for host, parameters in parameters_of(options.get("target_parameters") or [], base).items():
        for outside, parameter in enumerate(reversed(parameters)):
            rank, scale = at(f"{host}.{parameter}")
            site = sites.get(f"{host}.{parameter}") or sites.get(host)
            if site is None or site.parameter != parameter:
                raise FormatError(f"target_parameters: {host}.{parameter} is not a weight that can be adapted")
            found[site.name] = take_parameter(tensors, site, outside, rank), scale
    return {name: (within_rank(pair), scale) for name, (pair, scale) in found.items()}


def _support_dropout(names: Iterable[str], base: Base) -> bool:
    """Whether all of these weights support dropout."""
    sites = weight_sites(base.module)
    return all(sites[name].layout.has_activation for name in names)


def _divisor(r: int, rslora: bool) -> float:
    return math.sqrt(r) if rslora else r
