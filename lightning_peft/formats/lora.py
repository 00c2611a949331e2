"""LoRA and DoRA as PEFT writes them: ``peft_type`` LORA.

| weight | keys after the module | shapes |
|---|---|---|
| Linear, Conv1D | ``lora_A.weight``, ``lora_B.weight`` | (r, in), (out, r) |
| convolution | the same | (r, in, *kernel), (out, r / groups, 1, ...); PEFT's A reads all groups |
| Embedding | ``lora_embedding_A``, ``lora_embedding_B`` | (r, vocabulary), (dim, r) |
| MultiheadAttention | ``lora_A.weight``, ...; ``base_layer.out_proj.lora_A.weight``, ... | both projections or none |
| bare parameter | the same, after a ``base_layer.`` for each parameter around it | (experts r, in), (out, r experts) |
| DoRA | ``lora_magnitude_vector`` | (out), of a convolution (1, out, 1, ...) |

PEFT adds the change of an attention's ``out_proj`` twice as it runs, so half of it is written.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor

from lightning_peft.core.sites import Site, weight_sites
from lightning_peft.core.targets import no_match
from lightning_peft.formats.converter import Converter, Options, Reading, Tensors, Writing
from lightning_peft.formats.files import FormatError
from lightning_peft.formats.names import PREFIX, Base
from lightning_peft.formats.snapshot import Part, Snapshot
from lightning_peft.formats.targets import pattern_value, resolve, target_modules
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.lora import LoRA

__all__ = ["LoRAConverter"]


class LoRAConverter(Converter):
    """``peft_type`` LORA."""

    peft_type = "LORA"
    methods = (LoRA, DoRA)

    def write(self, snapshot: Snapshot, fold_scale: bool = False, **options: Any) -> Writing:
        method = snapshot.method
        assert isinstance(method, LoRA)
        pairs = [_Pair.of(part) for part in snapshot.parts]
        tensors: dict[str, Tensor] = {}
        for pair in pairs:
            if fold_scale:
                pair.b, pair.scale = pair.b * pair.scale, 1.0
            tensors |= pair.tensors()
        rslora = method.use_rslora and not fold_scale
        ranks = {pair.part.name: pair.r for pair in pairs}
        alphas = {pair.part.name: _plain(pair.scale * (math.sqrt(pair.r) if rslora else pair.r)) for pair in pairs}
        r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
        config = {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {name: value for name, value in ranks.items() if value != r},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
            "lora_dropout": method.dropout,
            "use_rslora": rslora,
            "use_dora": isinstance(method, DoRA),
            "fan_in_fan_out": any(part.kind == "Conv1D" for part in snapshot.parts),
            "init_lora_weights": True,
            "bias": "none",
            "target_modules": target_modules(ranks, snapshot.base),
        }
        return Writing(config, tensors)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        sites = weight_sites(base.module)
        r, alpha = options.number("r", 8), options.number("lora_alpha", 8)
        ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
        dora = bool(options.get("use_dora", False))
        found: dict[str, dict[str, Tensor]] = {}
        rank_at: dict[str, int] = {}
        alpha_at: dict[str, float] = {}
        for module in resolve(options, base):
            if module not in sites:
                raise FormatError(f"target_modules: {no_match(module, {n: s.module for n, s in sites.items()})}")
            rank_at[module] = pattern_value(ranks, module, r)
            alpha_at[module] = pattern_value(alphas, module, alpha)
            found[module] = _take(tensors, sites[module], rank_at[module], dora)
        _check(options)
        method = (DoRA if dora else LoRA)(
            r=r,
            alpha=alpha,
            dropout=options.number("lora_dropout", 0.0),
            targets=base.patterns(found),
            name=name,
            use_rslora=bool(options.get("use_rslora", False)),
            rank_pattern={base.patterns([n])[0]: value for n, value in rank_at.items() if value != r},
            alpha_pattern={base.patterns([n])[0]: value for n, value in alpha_at.items() if value != alpha},
            **common,
        )
        return Reading(method, found)


class _Pair:
    """A (r, in) and B (out, r) of one weight, with what scales their product."""

    def __init__(self, part: Part, a: Tensor, b: Tensor, scale: float) -> None:
        self.part, self.a, self.b, self.scale = part, a, b, scale

    @classmethod
    def of(cls, part: Part) -> _Pair:
        a, b = part.tensors["lora_A"], part.tensors["lora_B"]
        return cls(part, a, b, part.facts["scale"])

    @property
    def r(self) -> int:
        return self.a.shape[-2]

    def tensors(self) -> dict[str, Tensor]:
        key = f"{PREFIX}{self.part.host}"
        tensors = {f"{key}.lora_A.weight": self.a, f"{key}.lora_B.weight": self.b}
        if "magnitude" in self.part.tensors:
            tensors[f"{key}.lora_magnitude_vector"] = self.part.tensors["magnitude"]
        return tensors


#: options of PEFT's that make LoRA compute something else; the value by which they do not
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
#: options that only training, sharding or PEFT's bookkeeping reads; a kind of layer says itself how it is stored
_IGNORED = (
    *("megatron_config", "megatron_core", "runtime_config", "fan_in_fan_out", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
#: initialisations that leave the base as it is
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", None)


def _check(options: Options) -> None:
    """Refuse what would compute something else."""
    options.refuse(**_REFUSED)
    options.ignore(*_IGNORED)
    options.refuse(trainable_token_indices=None, target_parameters=None, modules_to_save=None)
    options.refuse(ensure_weight_tying=False, lora_bias=False, bias="none")
    init = options.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise FormatError(
            f"init_lora_weights={init!r} changed the base as it was initialised: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def _take(tensors: Tensors, site: Site, r: int, dora: bool) -> dict[str, Tensor]:
    rows, columns = site.shape
    taken = {
        "lora_A": tensors.take(f"{site.name}.lora_A.weight", (r, columns)),
        "lora_B": tensors.take(f"{site.name}.lora_B.weight", (rows, r)),
    }
    if dora:
        taken["magnitude"] = tensors.take(f"{site.name}.lora_magnitude_vector", (rows,))
    return taken


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _plain(value: float) -> float | int:
    """Without the noise of a division and its inverse."""
    near = round(value, 9)
    return int(near) if near == int(near) else near
