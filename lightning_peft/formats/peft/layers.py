"""Adapters that PEFT has one of for each layer, tensor by tensor as ours: the base of their converters."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_peft.core.state.adapter_records import AdapterRecord, layer_kind
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.targeting.patterns import no_match
from lightning_peft.core.targeting.sites import Site, weight_sites
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.peft.converter import PREFIX, Converter, NotInPeftError, Options, Reading, Tensors, Writing
from lightning_peft.formats.peft.option_table import Option
from lightning_peft.formats.peft.targets import resolve, target_modules
from lightning_peft.methods.families.weight import WeightMethod

__all__ = ["Layer", "LayerConverter"]


@dataclass(frozen=True)
class Layer:
    """A layer that is adapted.

    Attributes:
        name: its name in the base.
        kind: as :class:`AdapterRecord` names it.
        parameter: the adapted weight's name in it.
        stored: that weight's shape.
        host: the layer itself.
        own_forward: whether its class computes something else than the class it derives from.
    """

    name: str
    kind: str
    parameter: str
    stored: tuple[int, ...]
    host: Any
    own_forward: bool

    @classmethod
    def of(cls, part: AdapterRecord, base: Base) -> Layer:
        """The layer of a part of a snapshot."""
        host = base.module.get_submodule(part.host)
        return cls(part.name, part.kind, part.parameter, part.shape, host, bool(part.facts.get("own_forward")))

    @classmethod
    def at(cls, site: Site, name: str) -> Layer:
        """The layer of a site, by its name in the base."""
        kind, weight = layer_kind(site.module, site.layout), site.module.get_parameter(site.parameter)
        own_forward = kind in _LAYERS and not site.layout.has_activation
        return cls(name, kind, site.parameter, tuple(weight.shape), site.module, own_forward)


#: kinds that are called with activations
_LAYERS = frozenset({"Linear", "Conv1D", "Conv", "Embedding"})


class LayerConverter(Converter):
    """Base class of the converters of weight methods whose tensors PEFT stores under other names and shapes only.

    A subclass gives the options both ways, and :meth:`place`.
    """

    #: kinds of layers that PEFT adapts, as :class:`AdapterRecord` names them
    kinds: ClassVar[frozenset[str]]
    #: dimensions of the convolutions that PEFT adapts
    dimensions: ClassVar[frozenset[int]] = frozenset()
    #: whether some tensor has a side as long as the rank
    has_rank: ClassVar[bool] = False
    #: PEFT's options that are arguments of ours, for both directions
    table: ClassVar[tuple[Option, ...]] = ()
    #: our tensors that PEFT stores once for the model, with their full keys there
    shared: ClassVar[dict[str, str]] = {}
    #: our tensors that PEFT does not store
    not_in_peft: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        """PEFT's options beside the targets.

        Raises:
            NotInPeftError: PEFT cannot say this.
        """

    @abstractmethod
    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        """Our method for PEFT's options.

        Args:
            options: PEFT's.
            names: of the adapted modules, in the base.
            base: where they are.
            **arguments: ``targets``, ``name`` and what every method takes.
        """

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        """Where PEFT has our tensor ``key`` of ``shape``: its name after the module, and the same values' shape."""
        return key, shape

    def check(self, layer: Layer) -> None:
        """Refuse a layer that PEFT does not adapt, or adapts in another way.

        Raises:
            NotInPeftError: with the reason.
        """
        peft, dimensions = f"PEFT's {self.peft_type}", len(layer.stored) - 2
        known = layer.kind in self.kinds and layer.parameter == "weight"
        if not known or (layer.kind == "Conv" and dimensions not in self.dimensions):
            kind = f"Conv{dimensions}d" if layer.kind == "Conv" else layer.kind
            raise NotInPeftError(f"{peft} adapts no weight like {layer.name!r} ({kind})")
        if layer.own_forward or hasattr(layer.host, "embed_scale"):  # LoRA alone knows that scale
            raise NotInPeftError(
                f"{layer.name!r} computes something of its own, around which {peft} is another function"
            )
        if layer.kind == "Conv" and layer.host.padding_mode != "zeros":
            raise NotInPeftError(f"{peft} pads with zeros; {layer.name!r} has padding_mode={layer.host.padding_mode!r}")

    def write(self, snapshot: Snapshot, **options: Any) -> Writing:
        tensors: dict[str, Tensor] = {}
        for part in snapshot.adapter_records:
            layer = Layer.of(part, snapshot.base)
            self.check(layer)
            for key, tensor in part.tensors.items():
                if key in self.shared:
                    tensors[self.shared[key]] = tensor
                elif key not in self.not_in_peft:
                    theirs, shape = self.place(key, tuple(tensor.shape), layer)
                    tensors[f"{PREFIX}{part.host}.{theirs}"] = tensor.reshape(shape)
        targets = target_modules((part.name for part in snapshot.adapter_records), snapshot.base)
        wrapped = [part.host for part in snapshot.adapter_records]
        return Writing({"target_modules": targets, **self.config(snapshot)}, tensors, wrapped)

    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        names = resolve(options, base)
        options.ignore("init_weights", "fan_in_fan_out", "bias")
        sites = weight_sites(base.root)
        for module in names:
            if base.outer(module) not in sites:
                modules = {str(base.inner(n)): site.module for n, site in sites.items()}
                raise FormatError(f"target_modules: {no_match(module, modules)}")
            self.check(Layer.at(sites[base.outer(module)], module))
        method = self.method(options, names, base, targets=base.patterns(names), name=name, **common)
        # Before anything of that size is made.
        longest = max((max(tensors.shape(key), default=1) for key in tensors.keys()), default=0)  # noqa: SIM118
        for rank in (getattr(method, "r", None), *getattr(method, "rank_pattern", {}).values()):
            if rank is not None and self.has_rank and rank > longest:
                raise FormatError(f"r={rank}: no tensor in the file has a side of that length")
        found: dict[str, dict[str, Tensor]] = {}
        for outer, adapter in method.build_all(method.find(base.root, [])[0]).items():
            module = str(base.inner(outer))
            layer, mine = Layer.at(sites[outer], module), found.setdefault(module, {})
            for key, value in adapter.state_dict().items():
                shape = tuple(value.shape)
                if key in self.shared:
                    mine[key] = tensors.take(self.shared[key], shape, prefix="")
                elif key not in self.not_in_peft:
                    theirs, there = self.place(key, shape, layer)
                    mine[key] = tensors.take(f"{module}.{theirs}", there).reshape(shape)
        return Reading(method, found)
