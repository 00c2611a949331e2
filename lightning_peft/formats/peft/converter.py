"""The base class of converters, which map one PEFT adapter type to our methods and back.

A converter is one small class in ``families``. It knows PEFT's names of options and tensors. Module names, targets,
heads, files and checks are handled here and in the other modules of this folder. To add a converter, write the class
in a file of ``families``; it is found there.
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

#: the prefix of PEFT's keys that belong to a module
PREFIX = "base_model.model."


class NotInPeftError(FormatError):
    """Raised for an adapter that PEFT cannot represent. The adapter is then saved in this package's own format."""


@dataclass
class Writing:
    """The result of :meth:`Converter.write`.

    Attributes:
        config: PEFT's options, without those that every method has.
        tensors: PEFT's full key -> tensor.
        wrapped: The modules that PEFT wraps; it calls their own parameters ``<module>.base_layer.<parameter>``.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    wrapped: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """The result of :meth:`Converter.read`.

    Attributes:
        method: Our method; its targets match exactly the modules that the file adapts.
        tensors: Name of the adapted weight in the base -> name inside the adapter -> tensor. An adapter that does not
            adapt a weight is listed under its host's name.
        own: Name in the base -> value of base parameters that the file stores under other names.
    """

    method: PEFTMethod
    tensors: dict[str, dict[str, Tensor]]
    own: dict[str, Tensor] = field(default_factory=dict)


class Converter(ABC):
    """Converts one ``peft_type`` to method classes of this package and back."""

    peft_type: ClassVar[str]
    methods: ClassVar[tuple[type[PEFTMethod], ...]]
    #: the prefix of the keys of the base's own values
    prefix: ClassVar[str] = PREFIX

    @abstractmethod
    def write(self, snapshot: Snapshot, fold_scale: bool = False) -> Writing:
        """Return PEFT's options and tensors for ``snapshot``, without its heads, which the caller writes.

        Args:
            snapshot: The adapter.
            fold_scale: Multiply LoRA's B by the scale; the other types have no scale that tools ignore.

        Raises:
            NotInPeftError: if PEFT cannot represent the adapter; the message is the reason.
        """
        raise NotImplementedError

    @abstractmethod
    def read(self, options: Options, tensors: Tensors, base: Base, name: str, **common: Any) -> Reading:
        """Return our method and its tensors, without heads, which the caller has already taken.

        Args:
            options: PEFT's options. Read, ignore or refuse every one, or :meth:`Options.done` raises.
            tensors: The file's tensors without those of the heads. Take every one, or :meth:`Tensors.done` raises.
            base: The base that they belong to.
            name: The adapter's name.
            **common: Arguments that every method takes (``trainable``, ``audit``).

        Raises:
            FormatError: if an option is unknown or not supported, or a tensor is missing or misshapen.
        """
        raise NotImplementedError


class Options:
    """PEFT's configuration of one adapter. It records which options were read, so that none is ignored silently.

    Args:
        config: The content of ``adapter_config.json``.
        ignored: Options that the user wants to be ignored.

    Raises:
        FormatError: if an option that names modules has a value of the wrong type.
    """

    #: options of every adapter that do not change its output
    COMMON = (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        "inference_mode",
    )

    def __init__(self, config: Mapping[str, Any], ignored: Collection[str] = ()) -> None:
        check_types(config)
        self._config = dict(config)
        self._seen = {*self.COMMON, *ignored}

    def get(self, option: str, default: Any = None) -> Any:
        """Return the value of ``option``, and count it as read."""
        self._seen.add(option)
        return self._config.get(option, default)

    def number(self, option: str, default: float) -> Any:
        """Return the value of ``option``, which must be a number.

        Raises:
            FormatError: if it is not a number.
        """
        value = self.get(option, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{option} must be a number, got {value!r}")
        return value

    def ignore(self, *options: str) -> None:
        """Count options as read that do not change the output: only training or PEFT's bookkeeping uses them."""
        self._seen.update(options)

    def refuse(self, **options: Any) -> None:
        """Refuse options that change the output in a way that is not supported here.

        Args:
            **options: Option -> the value with which it has no effect.

        Raises:
            FormatError: if an option has another value.
        """
        for option, harmless in options.items():
            value = self.get(option, harmless)
            if value != harmless and value not in (None, [], {}, ""):
                raise FormatError(
                    f"{option}={value!r} is not supported: without it, the adapter's output would differ from PEFT's"
                )

    def done(self) -> None:
        """Check that every option was read.

        Raises:
            FormatError: if an option was not read and has a value.
        """
        left = {o: v for o, v in self._config.items() if o not in self._seen and v not in (None, False, [], {}, "")}
        if left:
            option, value = next(iter(left.items()))
            near = nearest(option, self._seen, n=1)
            hint = f"; nearest known: {near[0]!r}" if near else ""
            raise FormatError(
                f"unknown option {option}={value!r} for peft_type {self._config['peft_type']!r}{hint}; it may change "
                f"the adapter's output. If it does not, load with ignore_options=[{option!r}]"
            )


class Tensors:
    """The tensors of a file. Converters take them one by one, so that none is ignored silently."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._left = dict(tensors)

    def keys(self) -> list[str]:
        """The keys that were not taken yet."""
        return list(self._left)

    def shape(self, full: str) -> tuple[int, ...]:
        """The shape of the tensor with the full key ``full``."""
        return tuple(self._left[full].shape)

    def has(self, key: str) -> bool:
        """Whether there is a tensor ``key``, given without the prefix."""
        return PREFIX + key in self._left

    def take(self, key: str, shape: tuple[int | None, ...] | None = None, prefix: str = PREFIX) -> Tensor:
        """Return the tensor ``key`` and remove it from those that are left.

        Args:
            key: The key without the prefix.
            shape: The shape it must have; None as a dimension allows any size.
            prefix: The prefix of the key.

        Raises:
            FormatError: if the tensor is missing or has another shape.
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
            raise FormatError(f"{full!r} has shape {'x'.join(map(str, tensor.shape))}, but this base needs {wanted}")
        return tensor

    def done(self) -> None:
        """Check that every tensor was taken.

        Raises:
            FormatError: if tensors are left.
        """
        if self._left:
            left = sorted(self._left)
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise FormatError(f"the file holds tensors that its configuration does not mention: {left[:5]}{more}")
