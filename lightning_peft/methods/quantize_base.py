"""Quantise the frozen base at the moment of injection: QLoRA and related methods.

    y = dequantise(W_q) x + s B A x

The weights of linear layers are stored in 4 or 8 bits per value, in blocks with a scale each; adapters train in float32
next to them. NF4 uses the quantiles of a normal distribution as its 16 values.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. LLM.int8: Dettmers et al. 2022,
arXiv:2208.07339.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import lightning as L
from attrs import field
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_peft.core.names import listed
from lightning_peft.core.registry import register_method
from lightning_peft.core.targeting.packed import size_in_bytes
from lightning_peft.core.targeting.patterns import TargetError, as_patterns
from lightning_peft.core.targeting.sites import Site, find_sites
from lightning_peft.core.targeting.ties import tied_names
from lightning_peft.methods.families.arguments import as_dict
from lightning_peft.methods.families.declared import Declared, target_patterns
from lightning_peft.methods.shared.quantizers import check_options, quantize_layer
from lightning_peft.trainer.prepare_run import prepare_run

__all__ = ["QuantizeBase"]


class QuantizeBase(Declared, Callback):
    """Quantise the linear layers of the base before adapters are injected (QLoRA, arXiv:2305.14314).

    Use it together with methods, on a Trainer or in ``lp.apply``. Checkpoints and adapter directories record it:
    ``lp.load_from_checkpoint`` quantises the base again in the same way, and loading onto a base that is not quantised
    is an error. It needs the package of its backend (``pip install lightning-peft[quantised]``).

    Args:
        kind: ``"nf4"``, ``"fp4"`` (bitsandbytes, 4 bits), ``"int8"`` (bitsandbytes or torchao), ``"int4"`` (torchao,
            which stores a byte for each value) or ``"float8"`` (torchao).
        targets: the layers to quantise: ``"all-linear"`` (every ``nn.Linear`` except the output head) or patterns.
        exclude: patterns to exclude from ``targets``.
        backend: ``"bitsandbytes"``, ``"torchao"``, or ``"auto"``: bitsandbytes if it has ``kind``.
        options: options of the backend. For nf4 and fp4: ``compress_statistics`` (quantise the scales too; default
            True) and ``compute_dtype`` (a name such as ``"bfloat16"``; default: the dtype of the weight). For
            bitsandbytes' int8: ``threshold``. For torchao's int4: ``group_size`` (default 32).

    Raises:
        ValueError: if the backend does not have this kind or option, or is not installed.
        TargetError: if a pattern matches nothing, or a layer that is not a plain ``nn.Linear`` with its own weight.

    Example::

        trainer = L.Trainer(callbacks=[lp.QuantizeBase("nf4"), lp.LoRA(r=8)])
    """

    kind: Literal["nf4", "fp4", "int8", "int4", "float8"] = field(default="nf4", kw_only=False)
    targets: str | Sequence[str] = field(default="all-linear", converter=target_patterns)
    exclude: str | Sequence[str] = field(default=(), converter=target_patterns)
    backend: Literal["auto", "bitsandbytes", "torchao"] = "auto"
    options: Mapping[str, Any] | None = field(default=None, converter=as_dict)

    def check(self) -> None:
        check_options(self.kind, self.backend, self.options or {})

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        prepare_run(trainer, pl_module)

    def prepare(self, model: nn.Module, preview: bool = False) -> str:
        """Quantise the layers of ``model`` in place, or with ``preview`` only find them; return what was done."""
        sites, left_out = self._layers(model)
        before = sum(site.weight.nbytes for site in sites)
        what = f"{type(self).__name__}: {len(sites)} layers"
        skipped = f"; not {listed(left_out)}" if left_out else ""
        if preview:
            return f"{what} would be quantised to {self.kind} (now {before:,} bytes){skipped}"
        for site in sites:
            quantize_layer(site.module, self.kind, self.backend, self.options or {})
        after = sum(size_in_bytes(site.module) for site in sites)
        return f"{what} quantised to {self.kind}, {before:,} to {after:,} bytes{skipped}"

    def _layers(self, model: nn.Module) -> tuple[list[Site], list[str]]:
        """The layers to quantise, and the names of those that ``all-linear`` leaves out although they are linear."""
        found, _ = find_sites(model, self.targets, self.exclude)
        tied = tied_names(model)
        problems = {name: why for name, site in found.items() if (why := _problem(site, tied)) is not None}
        if set(as_patterns(self.targets, "targets")) != {"all-linear"} and problems:
            name, why = next(iter(problems.items()))
            raise TargetError(f"QuantizeBase: {name!r} {why}. Exclude it (exclude={list(problems)})")
        sites = [site for name, site in found.items() if name not in problems]
        if not sites:
            raise TargetError(
                f"QuantizeBase: no layer to quantise; {listed(f'{n!r} {why}' for n, why in problems.items())}"
            )
        return sites, list(problems)


def _problem(site: Site, tied: Mapping[str, list[str]]) -> str | None:
    if site.is_packed:
        return "is quantised already"
    if type(site.module) is not nn.Linear or site.is_computed:
        return f"is not a plain nn.Linear ({type(site.module).__name__})"
    if site.weight.is_meta:
        return "has no values yet: load the base before methods are applied"
    if (weight := f"{site.host}.weight") in tied:
        return f"shares its weight with {', '.join(n for n in tied[weight] if n != weight)}"
    return None


register_method(cast(Any, QuantizeBase))  # files name it like a method
