"""Describe adapters as plain data: where each one is, properties of the layer under it, and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.adapters.stack import AdapterStack
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.names import canonical
from lightning_peft.core.sharded_tensors import gather_full
from lightning_peft.core.targeting.computed_weights import steady_tensor
from lightning_peft.core.targeting.layouts import (
    ConvLayout,
    ConvTransposeLayout,
    EmbeddingLayout,
    NormLayout,
    OtherLinearLayout,
    OtherTransposedLayout,
    PackedLayout,
    TransposedLayout,
    WeightLayout,
    weight_name,
)
from lightning_peft.core.targeting.packed import linear_sizes
from lightning_peft.core.targeting.recurrent import RecurrentLayout

__all__ = [
    "AdapterRecord",
    "adapted_names",
    "adapter_records",
    "gather_to_cpu",
    "layer_facts",
    "layer_kind",
    "uncopied",
]


def gather_to_cpu(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` on the CPU; a sharded tensor is gathered first."""
    return gather_full(tensor).detach().to("cpu", copy=True).contiguous()


def uncopied(tensor: Tensor) -> Tensor:
    """Return ``tensor`` detached but not copied, for a trial that does not write anything."""
    return tensor.detach()


@dataclass
class AdapterRecord:
    """One adapter of one module, or of one of its weights.

    Attributes:
        host: the name in the base of the module that carries it.
        parameter: the adapted weight's name inside the host; ``""`` if the adapter does not adapt a weight.
        kind: ``Linear``, ``Conv1D`` (Hugging Face's, stored transposed), ``Conv``, ``ConvTranspose``, ``Embedding``,
            ``Norm``, ``Attention`` (a projection of ``nn.MultiheadAttention``), ``Recurrent``, ``OtherLinear`` and
            ``OtherTransposed`` (linear layers that do not derive from ``nn.Linear``), ``Parameter`` (a bare one, or a
            recurrent cell's), or the host's class.
        shape: the stored shape of the adapted weight.
        facts: plain values: the adapter's ``r``, ``scale`` and ``tokens``; a convolution's ``groups``, ``dilation``
            and ``padding_mode``; ``own_forward`` if the layer computes something different from its class.
        tensors: the adapter's tensors, by name inside it.
    """

    host: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name that patterns match: the module's, or the parameter's if the module has several adapted weights."""
        return weight_name(self.host, self.parameter, bare=self.kind == "Parameter")


def adapted_names(parts: Iterable[AdapterRecord]) -> list[str]:
    """Return the names of adapted weights, and of modules with adapters that do not adapt a weight."""
    return [".".join(filter(None, (part.host, part.parameter))) for part in parts]


def adapter_records(
    model: nn.Module, name: str, take: Callable[[Tensor], Tensor] | None = gather_to_cpu
) -> Iterator[AdapterRecord]:
    """Yield a record for each adapter called ``name`` in ``model``; parameter overrides are not included.

    Args:
        model: the module that contains them.
        name: the adapter's name.
        take: called with each of their tensors; None leaves the tensors out.
    """
    for host_name, host in hosts(model):
        stack = cast(AdapterStack, host.adapters)
        if name in stack:
            adapter = cast(Adapter, stack[name])
            weights = adapter.weights()
            for parameter, part in weights.items():
                shape = stored_shape(host, parameter, part.layout)
                facts = {n: getattr(part, n) for n in ("r", "scale", "tokens") if hasattr(part, n)}
                facts |= layer_facts(host, part.layout)
                kind = layer_kind(host, part.layout)
                yield AdapterRecord(canonical(host_name), parameter, kind, shape, facts, _tensors(part, take))
            if not weights and not adapter.overrides():
                kind = original_class(host).__name__
                yield AdapterRecord(canonical(host_name), "", kind, (), {}, _tensors(adapter, take))


def _tensors(adapter: Adapter, take: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    if take is None:
        return {}
    return {key: take(value) for key, value in adapter.state_dict().items() if not key.startswith("replacement.")}


def stored_shape(host: nn.Module, parameter: str, layout: WeightLayout) -> tuple[int, ...]:
    """The stored shape of an adapted weight; for a packed layer, the shape of its matrix in the layer it replaced."""
    packed = linear_sizes(host) if isinstance(layout, PackedLayout) else None
    return tuple(cast(Tensor, steady_tensor(host, parameter)).shape) if packed is None else packed


def layer_kind(host: nn.Module, layout: WeightLayout) -> str:
    """Return the kind of the weight that ``layout`` reads from ``host``; see :class:`AdapterRecord`."""
    if isinstance(host, nn.MultiheadAttention):
        return "Attention"
    if isinstance(layout, RecurrentLayout):
        return "Recurrent" if isinstance(host, nn.RNNBase) else "Parameter"
    kinds = {
        OtherLinearLayout: "OtherLinear",
        OtherTransposedLayout: "OtherTransposed",
        TransposedLayout: "Conv1D",
        EmbeddingLayout: "Embedding",
        ConvLayout: "Conv",
        ConvTransposeLayout: "ConvTranspose",
        NormLayout: "Norm",
        PackedLayout: "Linear",
    }
    return kinds.get(type(layout), "Linear" if isinstance(host, nn.Linear) else "Parameter")


def layer_facts(host: Any, layout: WeightLayout) -> dict[str, Any]:
    """Return the properties of a layer that a file must record; see :class:`AdapterRecord`."""
    facts: dict[str, Any] = {}
    if isinstance(layout, ConvLayout):
        facts = {"groups": host.groups, "dilation": list(host.dilation), "padding_mode": host.padding_mode}
    if getattr(host, "is_transposed", False):
        facts["is_transposed"] = True
    is_read = type(layout) in (WeightLayout, RecurrentLayout)
    if not is_read and not layout.has_activation and not hasattr(host, "embed_scale"):
        facts["own_forward"] = True
    return facts
