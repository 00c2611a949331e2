"""The base class of converters for weight methods that have one adapter per layer, in PEFT as here."""

from __future__ import annotations

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
from lightning_peft.formats.peft.option_table import Option, read_options, written_options
from lightning_peft.formats.peft.targets import resolve, target_modules
from lightning_peft.methods.families.weight import WeightMethod

__all__ = ["Layer", "LayerConverter"]


@dataclass(frozen=True)
class Layer:
    """An adapted layer.

    Attributes:
        name: The layer's name in the base.
        kind: The layer kind, as in :class:`AdapterRecord`.
        parameter: The name of the adapted weight in the layer.
        stored: The shape of the stored weight.
        host: The layer.
        own_forward: Whether its class overrides ``forward`` of the torch class that it derives from.
    """

    name: str
    kind: str
    parameter: str
    stored: tuple[int, ...]
    host: Any
    own_forward: bool

    @classmethod
    def of(cls, part: AdapterRecord, base: Base) -> Layer:
        """The layer that an adapter record of a snapshot describes."""
        host = base.module.get_submodule(part.host)
        return cls(part.name, part.kind, part.parameter, part.shape, host, bool(part.facts.get("own_forward")))

    @classmethod
    def at(cls, site: Site, name: str) -> Layer:
        """The layer of ``site``, called ``name`` in the base."""
        kind, weight = layer_kind(site.module, site.layout), site.weight
        own_forward = kind in _LAYERS and not site.layout.has_activation
        return cls(name, kind, site.parameter, tuple(weight.shape), site.module, own_forward)


#: layer kinds that are called with activations
_LAYERS = frozenset({"Linear", "Conv1D", "Conv", "Embedding"})


class LayerConverter(Converter):
    """Base class of converters for weight methods whose tensors differ from PEFT's in names and shapes only.

    A subclass defines :attr:`kinds` and :attr:`table`, and overrides methods for anything that these cannot express.
    """

    methods: ClassVar[tuple[type[WeightMethod], ...]]
    #: layer kinds that PEFT adapts, as in :class:`AdapterRecord`
    kinds: ClassVar[frozenset[str]]
    #: numbers of kernel dimensions of the convolutions that PEFT adapts
    dimensions: ClassVar[frozenset[int]] = frozenset()
    #: whether one of the tensors has a dimension of size r, which bounds a declared r
    has_rank: ClassVar[bool] = False
    #: PEFT's options that correspond to arguments of the method, for both directions
    table: ClassVar[tuple[Option, ...]] = ()
    #: PEFT's options that always have the same value, as this package writes them
    constants: ClassVar[dict[str, Any]] = {"init_weights": True}
    #: our name -> PEFT's full key, for tensors that PEFT stores once per model
    shared: ClassVar[dict[str, str]] = {}
    #: our tensors that PEFT does not store
    not_in_peft: ClassVar[frozenset[str]] = frozenset()

    def config(self, snapshot: Snapshot) -> dict[str, Any]:
        """Return PEFT's options other than the targets.

        Raises:
            NotInPeftError: if PEFT cannot represent the method's arguments.
        """
        transposed = any(part.kind == "Conv1D" for part in snapshot.adapter_records)
        stored_as = {"fan_in_fan_out": transposed} if "Conv1D" in self.kinds else {}
        return {**written_options(self.table, snapshot.method), **stored_as, **self.constants}

    def method(self, options: Options, names: list[str], base: Base, **arguments: Any) -> WeightMethod:
        """Return our method for PEFT's options.

        Args:
            options: PEFT's options.
            names: The names of the adapted modules in the base.
            base: The base.
            **arguments: ``targets``, ``name`` and the arguments that every method takes.
        """
        return self.methods[0](**read_options(self.table, options), **arguments)

    def place(self, key: str, shape: tuple[int, ...], layer: Layer) -> tuple[str, tuple[int, ...]]:
        """Return PEFT's name (without the module's name) and PEFT's shape for our tensor ``key`` of shape ``shape``."""
        return key, shape

    def check(self, layer: Layer) -> None:
        """Refuse a layer that PEFT does not adapt, or adapts with a different result.

        Raises:
            NotInPeftError: if so; the message is the reason.
        """
        peft, dimensions = f"PEFT's {self.peft_type}", len(layer.stored) - 2
        known = layer.kind in self.kinds and layer.parameter == "weight"
        if not known or (layer.kind == "Conv" and dimensions not in self.dimensions):
            kind = f"Conv{dimensions}d" if layer.kind == "Conv" else layer.kind
            raise NotInPeftError(f"{peft} does not adapt weights like {layer.name!r} ({kind})")
        if layer.own_forward or hasattr(layer.host, "embed_scale"):  # PEFT applies embed_scale in its LoRA only
            raise NotInPeftError(
                f"{layer.name!r} overrides the forward of its class, and {peft} would give a different result there"
            )
        if layer.kind == "Conv" and layer.host.padding_mode != "zeros":
            raise NotInPeftError(
                f"{peft} pads with zeros, but {layer.name!r} has padding_mode={layer.host.padding_mode!r}"
            )

    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
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
        options.ignore(*self.constants, "init_weights", "fan_in_fan_out", "bias")
        sites = weight_sites(base.root)
        for module in names:
            if base.outer(module) not in sites:
                modules = {str(base.inner(n)): site.module for n, site in sites.items()}
                raise FormatError(f"target_modules: {no_match(module, modules)}")
            self.check(Layer.at(sites[base.outer(module)], module))
        method = self.method(options, names, base, targets=base.patterns(names), name=name, **common)
        # Checked before the adapters are built: an edited r could otherwise allocate all memory.
        longest = max((max(tensors.shape(key), default=1) for key in tensors.keys()), default=0)  # noqa: SIM118
        for rank in (getattr(method, "r", None), *getattr(method, "rank_pattern", {}).values()):
            if rank is not None and self.has_rank and rank > longest:
                raise FormatError(f"r={rank}, but no tensor in the file has a dimension of that size: it was edited")
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
