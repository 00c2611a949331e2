"""What a converter is: how one kind of PEFT's adapters maps to one of ours, both ways.

A converter is one small class in the file of its family. It knows PEFT's names of options and tensors; names of
modules, targets, heads, files and checks are handled here and in the modules beside it. To add one, write the class
and put it into :data:`lightning_peft.formats.registry.CONVERTERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lightning_peft.core.names import nearest
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.option_types import check_types
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.methods.families.method import PEFTMethod

__all__ = ["PREFIX", "Converter", "NotInPeftError", "Options", "Reading", "Tensors", "Writing"]

#: what every key of PEFT's that belongs to a module starts with
PREFIX = "base_model.model."


class NotInPeftError(FormatError):
    """An adapter that PEFT's format cannot say; it is written in this package's own."""


@dataclass
class Writing:
    """What a converter writes.

    Attributes:
        config: PEFT's options, without those that every method has.
        tensors: by PEFT's full keys.
        wrapped: the modules that PEFT wraps, whose own parameters it then calls ``<module>.base_layer.<parameter>``.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    wrapped: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """What a converter reads.

    Attributes:
        method: ours, whose targets mean exactly the modules that the file adapts.
        tensors: the adapters' tensors: the weight's name in the base (the host's, where an adapter is of no weight)
            -> name inside the adapter -> tensor.
        own: values of the base's own parameters that stand under other names in the file, by name in the base.
    """

    method: PEFTMethod
    tensors: dict[str, dict[str, Tensor]]
    own: dict[str, Tensor] = field(default_factory=dict)


class Converter(ABC):
    """One ``peft_type`` and the method classes that are written as it."""

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[type[PEFTMethod], ...]]
    #: what the keys of the base's own values start with
    prefix: ClassVar[str] = PREFIX

    @abstractmethod
    def write(self, snapshot: Snapshot, **options: Any) -> Writing:
        """PEFT's options and tensors for ``snapshot``; heads are written for it.

        Raises:
            NotInPeftError: PEFT cannot say this, with the reason.
        """
        raise NotImplementedError

    @abstractmethod
    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        """Our method called ``name`` and its tensors; heads are read for it.

        Args:
            options: PEFT's options.
            tensors: the file's tensors without the heads'; take every one.
            base: where to put them.
            name: what to call the adapter.
            **common: arguments that every method takes (``trainable``, ``audit``).

        Raises:
            FormatError: an option that is unknown or not supported; a tensor missing, misshapen or left over.
        """
        raise NotImplementedError


class Options:
    """PEFT's configuration of one adapter, of which every option has to be looked at.

    Args:
        config: the file's content.
        ignored: options that the user has said change nothing.

    Raises:
        FormatError: an option that names modules has a value of another type.
    """

    #: of every adapter; they name and describe and change no function
    COMMON = (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        "inference_mode",
    )

    def __init__(self, config: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        check_types(config)
        self._config = dict(config)
        self._seen = {*self.COMMON, *ignored}

    def get(self, option: str, default: Any = None) -> Any:
        """The value of ``option``."""
        self._seen.add(option)
        return self._config.get(option, default)

    def number(self, option: str, default: float) -> Any:
        """A number.

        Raises:
            FormatError: it is none.
        """
        value = self.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{option} must be a number, got {value!r}")
        return value

    def ignore(self, *options: str) -> None:
        """Options that only training or PEFT's own bookkeeping reads."""
        self._seen.update(options)

    def refuse(self, **options: Any) -> None:
        """Options that change the function in a way we have not, with the value by which they do not.

        Raises:
            FormatError: one has another value.
        """
        for option, harmless in options.items():
            value = self.get(option, harmless)
            if value != harmless and value not in (None, [], {}, ""):
                raise FormatError(f"{option}={value!r} is not supported: the adapter would compute something else")

    def done(self) -> None:
        """Every option was looked at.

        Raises:
            FormatError: one was not, and has a value.
        """
        left = {o: v for o, v in self._config.items() if o not in self._seen and v not in (None, False, [], {}, "")}
        if left:
            option, value = next(iter(left.items()))
            near = nearest(option, self._seen, n=1)
            hint = f"; nearest known: {near[0]!r}" if near else ""
            raise FormatError(
                f"unknown option {option}={value!r} for peft_type {self._config['peft_type']!r}{hint}; it may change "
                f"what the adapter computes. If it does not, load with ignore_options=[{option!r}]"
            )


class Tensors:
    """The tensors of a file, of which every one has to be taken."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)

    def keys(self) -> list[str]:
        """The keys that are left."""
        return list(self._left)

    def shape(self, full: str) -> tuple[int, ...]:
        """The shape of the tensor that the file calls ``full``."""
        return tuple(self._left[full].shape)

    def has(self, key: str) -> bool:
        """Whether there is a tensor called ``key``, without the prefix."""
        return PREFIX + key in self._left

    def take(self, key: str, shape: tuple[int | None, ...] | None = None, prefix: str = PREFIX) -> Tensor:
        """The tensor called ``key``.

        Args:
            key: without the prefix.
            shape: what it has to be; None for a dimension stands for any size.
            prefix: what every key starts with.

        Raises:
            FormatError: it is missing or misshapen.
        """
        full = prefix + key
        tensor = self._left.pop(full, None)
        if tensor is None:
            near = nearest(full, self._left, n=1, cutoff=0.6)
            raise FormatError(f"the file has no tensor {full!r}" + (f"; nearest: {near[0]!r}" if near else ""))
        fits = shape is None or (
            len(shape) == tensor.ndim and all(want in (None, have) for want, have in zip(shape, tensor.shape))
        )
        if not fits:
            wanted = "x".join("*" if n is None else str(n) for n in shape or ())
            raise FormatError(f"{full!r} is {'x'.join(map(str, tensor.shape))}; this base needs {wanted}")
        return tensor

    def done(self) -> None:
        """Every tensor was taken.

        Raises:
            FormatError: some were not.
        """
        if self._left:
            left = sorted(self._left)
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise FormatError(f"the file holds tensors that its configuration has no place for: {left[:5]}{more}")
