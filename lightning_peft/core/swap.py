"""Give one object a mixin by swapping its class in place.

The object keeps its identity, attributes, parameter names and ``isinstance`` relations; only its class becomes
a cached subclass ``(Mixin, Original)``. torch's ``fully_shard`` and ``parametrize`` work the same way. Unlike a
wrapper, nothing that holds a reference to the object has to know. Copying and pickling work, because the
subclass is rebuilt from the original class and the mixins.

A mixin derives from the class that all its objects derive from (``nn.Module``, ``DataLoader``): Python allows the swap
only between classes of one memory layout.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

__all__ = ["add_mixin", "has_mixin", "original_class", "remove_mixin", "restore_class"]


def original_class(obj: object) -> type:
    """The class ``obj`` had before any mixin was added."""
    return getattr(type(obj), "_swapped_from", type(obj))


def has_mixin(obj: object, mixin: type) -> bool:
    """Whether ``mixin`` was added to ``obj`` (by :func:`add_mixin`, not by inheritance)."""
    return mixin in _mixins(obj)


def add_mixin(obj: object, mixin: type) -> None:
    """Put ``mixin`` in front of the class of ``obj``; does nothing where it is already there."""
    if not has_mixin(obj, mixin):
        obj.__class__ = _swapped(original_class(obj), (mixin, *_mixins(obj)))


def remove_mixin(obj: object, mixin: type) -> None:
    """Take ``mixin`` away again; the last one gone, the object has its original class."""
    left = tuple(m for m in _mixins(obj) if m is not mixin)
    obj.__class__ = _swapped(original_class(obj), left) if left else original_class(obj)


def restore_class(obj: object) -> None:
    """Take every mixin away."""
    obj.__class__ = original_class(obj)


def _mixins(obj: object) -> tuple[type, ...]:
    return getattr(type(obj), "_swapped_mixins", ())


@functools.cache
def _swapped(original: type, mixins: tuple[type, ...]) -> type:
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,  # transformers looks a model's class up by str(class)
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_swapped_from": original,
        "_swapped_mixins": mixins,
    }
    forward = next((mixin.__dict__["forward"] for mixin in mixins if "forward" in mixin.__dict__), None)
    if forward is not None and hasattr(original, "forward"):
        namespace["forward"] = _signed(forward, original.forward)
    # By the original's name: transformers writes it into config.json, and reads kinds of modules from it.
    return type(original)(original.__name__, (*mixins, original), namespace)


def _signed(function: Any, like: Any) -> Any:
    """A copy of ``function`` with the signature of ``like``: callers look up by it what they may pass."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = like.__qualname__
    copy.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return copy


def _reduce_ex(self: Any, protocol: Any) -> tuple:
    # The default reduction names the class, which no import can find; name its ingredients instead.
    rest = tuple(object.__reduce_ex__(self, 2))[2:]
    return (_rebuild, (original_class(self), _mixins(self)), *rest)


def _rebuild(original: Any, mixins: tuple[type, ...]) -> object:
    return original.__new__(_swapped(original, mixins))
