"""Convert AdaLoRA to and from PEFT's ``peft_type`` ADALORA.

The keys are ``lora_A`` (r, in), ``lora_E`` (r, 1) and ``lora_B`` (out, r), without ``.weight``. If triplets of a matrix
were pruned, only the remaining ones are stored, and ``rank_pattern`` says which they are:
``{"<module>.lora_E": [true, false, ...]}``. The scale is always lora_alpha / (init_r + 1e-5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.patterns import no_match
from lightning_peft.core.targeting.sites import Site, weight_sites
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.base_values import bias_option
from lightning_peft.formats.peft.converter import PREFIX, Converter, NotInPeftError, Options, Reading, Tensors, Writing
from lightning_peft.formats.peft.families.lora import TRAINING_OPTIONS
from lightning_peft.formats.peft.layers import Layer
from lightning_peft.formats.peft.option_table import Option, read_options, written_options
from lightning_peft.formats.peft.targets import resolve, target_modules
from lightning_peft.methods.adalora import AdaLoRA

__all__ = ["AdaLoRAConverter"]

_TABLE = (
    Option("tinit", 0),
    Option("tfinal", 0),
    Option("deltaT", 1),
    Option("beta1", 0.85),
    Option("beta2", 0.85),
    Option("orth_reg_weight", 0.5),
    Option("target_r", 8),
    Option("init_r", 12),
    Option("lora_alpha", 8, "alpha"),
    Option("lora_dropout", 0.0, "dropout"),
)


class AdaLoRAConverter(Converter):
    """``peft_type`` ADALORA."""

    peft_type = "ADALORA"
    methods = (AdaLoRA,)

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        method = snapshot.method
        assert isinstance(method, AdaLoRA)
        if method.alpha <= 0:
            raise NotInPeftError(f"alpha={method.alpha} is not above 0, and PEFT's AdaLoRA replaces such a value")
        tensors: dict[str, Tensor] = {}
        kept: dict[str, list[bool]] = {}
        for part in snapshot.adapter_records:
            _check(Layer.of(part, snapshot.base))
            mask, key = part.tensors["mask"].view(-1), f"{PREFIX}{part.host}"
            tensors[f"{key}.lora_A"] = part.tensors["lora_A"][mask]
            tensors[f"{key}.lora_E"] = part.tensors["lora_E"][mask]
            tensors[f"{key}.lora_B"] = part.tensors["lora_B"][:, mask]
            kept[f"{part.host}.lora_E"] = mask.tolist()
        modules = [part.host for part in snapshot.adapter_records]
        config = {
            **written_options(_TABLE, method),
            "total_step": method.total_step or max(method.step, method.tinit + method.tfinal + 1),
            "rank_pattern": kept if not all(all(mask) for mask in kept.values()) else None,
            "fan_in_fan_out": any(part.kind == "Conv1D" for part in snapshot.adapter_records),
            "bias": bias_option(snapshot, modules),
            "target_modules": target_modules(modules, snapshot.base),
        }
        return Writing(config, tensors, wrapped=modules)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        sites = weight_sites(base.module)
        given, masks = read_options(_TABLE, options), options.get("rank_pattern") or {}
        init_r = given["init_r"]
        if isinstance(init_r, bool) or not isinstance(init_r, int) or init_r < 1:
            raise FormatError(f"init_r must be an integer of at least 1, got {init_r!r}")
        found = {}
        for module in resolve(options, base):
            if module not in sites:
                raise FormatError(f"target_modules: {no_match(module, {n: site.module for n, site in sites.items()})}")
            _check(Layer.at(sites[module], module))
            found[module] = _take(tensors, sites[module], init_r, masks.get(f"{module}.lora_E"))
        options.refuse(use_dora=False, use_rslora=False, lora_bias=False, target_parameters=None)
        options.refuse(trainable_token_indices=None, layer_replication=None, alpha_pattern={})
        options.ignore(*TRAINING_OPTIONS, "total_step", "init_lora_weights", "bias", "r", "ensure_weight_tying")
        return Reading(AdaLoRA(targets=base.patterns(found), name=name, **given, **common), found)


def _check(layer: Layer) -> None:
    """Refuse a layer that PEFT's AdaLoRA does not adapt, or adapts with a different result.

    Raises:
        NotInPeftError: if so; the message is the reason.
    """
    if layer.kind not in ("Linear", "Conv1D", "Conv") or layer.own_forward:
        what = "it overrides the forward of its class" if layer.own_forward else f"it is a {layer.kind}"
        raise NotInPeftError(f"PEFT's AdaLoRA does not adapt {layer.name!r} with the same result: {what}")
    host = layer.host
    if layer.kind == "Conv" and (
        len(layer.stored) != 4 or host.groups > 1 or host.padding_mode != "zeros" or set(host.dilation) != {1}
    ):
        raise NotInPeftError(
            f"{layer.name!r} is a Conv{len(layer.stored) - 2}d with groups={host.groups}, dilation={host.dilation} and "
            f"padding_mode={host.padding_mode!r}: PEFT's AdaLoRA supports only a Conv2d without groups and dilation, "
            "padded with zeros"
        )


def _take(tensors: Tensors, site: Site, r: int, kept: list[bool] | None) -> dict[str, Tensor]:
    if kept is not None and len(kept) != r:
        raise FormatError(f"rank_pattern of {site.name!r} has {len(kept)} entries, but init_r is {r}: they must agree")
    (rows, columns), left = site.shape, r if kept is None else sum(kept)
    own_a, own_e, own_b = (
        tensors.take(f"{site.name}.{key}", shape)
        for key, shape in (("lora_A", (left, columns)), ("lora_E", (left, 1)), ("lora_B", (rows, left)))
    )
    # Pruned triplets are not in the file but are allocated here, so an edited init_r could allocate all memory.
    if r > max(rows, columns, left, 1024):
        raise FormatError(f"init_r={r} is more than the rank that {site.name!r} of shape {rows}x{columns} can have")
    mask = torch.ones(r, dtype=torch.bool) if kept is None else torch.tensor(kept)
    a = torch.zeros(r, columns).masked_scatter(mask[:, None], own_a)
    e = torch.zeros(r, 1).masked_scatter(mask[:, None], own_e)
    b = torch.zeros(rows, r).masked_scatter(mask[None], own_b)
    return {"lora_A": a, "lora_E": e, "lora_B": b, "mask": mask[:, None]}
