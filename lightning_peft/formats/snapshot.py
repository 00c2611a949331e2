"""What a method has put into a model, taken apart: the facts and the tensors that an adapter directory is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from lightning_peft.core.adapter import Adapter
from lightning_peft.core.host import AdapterStack, hosts
from lightning_peft.core.inject import Injection, injected_name, injection_of
from lightning_peft.core.sites import ConvLayout, EmbeddingLayout, Layout, NormLayout, TransposedLayout
from lightning_peft.core.state import StateError, canonical, trainable_keys
from lightning_peft.core.swap import original_class
from lightning_peft.formats.names import Base, base_of
from lightning_peft.methods.callback import PEFTMethod

__all__ = ["Part", "Snapshot", "kind_of", "take_snapshot", "whole"]


@dataclass
class Part:
    """One adapter of one module, or of one of its weights.

    Attributes:
        host: the module that carries it, by its name in the base.
        parameter: the adapted weight's name inside the host; ``""`` where the adapter is of no weight.
        kind: ``Linear``, ``Conv1D`` (Hugging Face's, stored transposed), ``Conv``, ``Embedding``, ``Norm``,
            ``Attention`` (a projection of ``nn.MultiheadAttention``), ``Parameter`` (a bare one), or the host's class.
        shape: the adapted weight's, as it is stored.
        facts: plain values: the adapter's ``r`` and ``scale``, its ``tokens``; a convolution's ``groups``, ``dilation``
            and ``padding_mode``; ``own_forward`` of a layer that computes something else than its class does.
        tensors: the adapter's own, by name inside it.
    """

    host: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The weight's name as patterns know it: the module's, or the parameter's where it is one of several."""
        return f"{self.host}.{self.parameter}".removesuffix(".weight").strip(".")


@dataclass
class Snapshot:
    """One method's share of a model.

    Attributes:
        method: the method, with its configuration.
        parts: its adapters.
        heads: modules that it trains in full, by their names in the base.
        trained: what it trains of the base itself (heads, biases, buffers that moved), by name in the base.
        base: the base they were put into.
        fingerprint: what identifies the frozen base, by names of the base.
    """

    method: PEFTMethod
    parts: list[Part]
    heads: list[str]
    trained: dict[str, Tensor]
    base: Base
    fingerprint: dict[str, Any]


def take_snapshot(model: nn.Module, name: str) -> Snapshot:
    """What the method called ``name`` has put into ``model``.

    Raises:
        ValueError: the model has no method of that name.
        StateError: adapters are merged into the weights.
    """
    record = injection_of(model)
    if record is None:
        raise ValueError("no method was applied to this model: lp.apply(model, ...) or train it first")
    if name not in record.methods:
        raise ValueError(f"no adapter named {name!r}; the model has {list(record.methods)}")
    root = model.get_submodule(injected_name(model))
    if any(cast(AdapterStack, host.adapters).merged is not None for _, host in hosts(root)):
        raise StateError("adapters are merged into the base, whose weights are not its own: lp.unmerge(model) first")
    base = base_of(root, _used(root, record))
    return Snapshot(
        method=cast(PEFTMethod, record.methods[name]),
        parts=list(_parts(base, name)),
        heads=_heads(base, record, name),
        trained={**_trained(base, record, name), **_copies(base, name)},
        base=base,
        fingerprint=_fingerprint(base, record),
    )


def _used(root: nn.Module, record: Injection) -> list[str]:
    trained = [name for trains in record.trains.values() for name in (*trains.modules, *trains.parameters)]
    return [*(canonical(name) for name, _ in hosts(root)), *trained]


def _parts(base: Base, name: str) -> Iterator[Part]:
    for host_name, host in hosts(base.module):
        stack = cast(AdapterStack, host.adapters)
        if name in stack:
            adapter = cast(Adapter, stack[name])
            weights = adapter.weights()
            for parameter, part in weights.items():
                stored = host.get_parameter(parameter)
                facts = {n: getattr(part, n) for n in ("r", "scale", "tokens") if hasattr(part, n)}
                facts |= _layer_facts(host, part.layout)
                kind = kind_of(host, part.layout)
                yield Part(canonical(host_name), parameter, kind, tuple(stored.shape), facts, _tensors(part))
            if not weights and not adapter.copies():
                yield Part(canonical(host_name), "", original_class(host).__name__, (), {}, _tensors(adapter))


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    own = adapter.state_dict()
    return {key: whole(value) for key, value in own.items() if not key.startswith("replacement.")}


def kind_of(host: nn.Module, layout: Any) -> str:
    """What kind of weight a layout of ``host`` reads: see :class:`Part`."""
    if isinstance(host, nn.MultiheadAttention):
        return "Attention"
    kinds = {TransposedLayout: "Conv1D", EmbeddingLayout: "Embedding", ConvLayout: "Conv", NormLayout: "Norm"}
    return kinds.get(type(layout), "Linear" if isinstance(host, nn.Linear) else "Parameter")


def _layer_facts(host: Any, layout: Layout) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if isinstance(layout, ConvLayout):
        facts = {"groups": host.groups, "dilation": list(host.dilation), "padding_mode": host.padding_mode}
    if getattr(host, "is_transposed", False):
        facts["is_transposed"] = True
    if type(layout) is not Layout and not layout.has_activation and not hasattr(host, "embed_scale"):
        facts["own_forward"] = True
    return facts


def _copies(base: Base, name: str) -> dict[str, Tensor]:
    """What stands in place of the base's own values, by name in the base."""
    found = {}
    for host_name, host in hosts(base.module):
        stack = cast(AdapterStack, host.adapters)
        for part in cast(Adapter, stack[name]).parts() if name in stack else ():
            for key, value in part.copies().items():
                found[f"{canonical(host_name)}.{key}".lstrip(".")] = whole(value)
    return found


def _heads(base: Base, record: Injection, name: str) -> list[str]:
    in_full = record.trains[name].modules or cast(PEFTMethod, record.methods[name]).heads(base.root)
    return [cast(str, base.inner(head)) for head in in_full]


def _trained(base: Base, record: Injection, name: str) -> dict[str, Tensor]:
    trains = record.trains[name]
    state = {canonical(key): value for key, value in base.root.state_dict().items()}
    adapters = [f"{host}.adapters." if host else "adapters." for host, _ in hosts(base.root)]
    inside = [f"{head}." if head else "" for head in trains.modules]
    wanted = {
        key
        for key in state
        if (key in trains.parameters or any(key.startswith(prefix) for prefix in inside))
        and not any(key.startswith(prefix) for prefix in adapters)
    }
    if record.methods[name].train_norm_stats:
        wanted |= trainable_keys(base.root) & dict(base.root.named_buffers()).keys()
    return {cast(str, base.inner(key)): whole(state[key]) for key in sorted(wanted)}


def _fingerprint(base: Base, record: Injection) -> dict[str, Any]:
    values = {base.inner(name): value for name, value in record.fingerprint.get("values", {}).items()}
    return {"values": {name: value for name, value in values.items() if name}}


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU and of its own; of a sharded one all of it."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous()
