"""Give one object a mixin by swapping its class in place.

The object keeps its identity, attributes, parameter names and ``isinstance`` relations; only its class becomes
a cached subclass of the original, with the mixins ahead of the original in the method resolution order. torch's
``fully_shard`` and ``parametrize`` work the same way. Unlike a wrapper, nothing that holds a reference to the object
has to know. Copying and pickling work, because the subclass is rebuilt from the original class and the mixins.

Python allows the swap only between classes of one memory layout, and a class has the layout of its first base. So the
original is the subclass's only base, and its metaclass puts the mixins into the resolution order: as bases ahead of the
original, they would change the layout if the original derives from ``ABC``, ``Generic`` or a class with ``__slots__``.

A ``forward`` that is set on the instance (accelerate's hooks, fused kernels) would hide a mixin's. One that is there
before the first such mixin runs inside of it, in place of the class's; see :class:`OwnForward`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

__all__ = [
    "OwnForward",
    "SwapError",
    "add_mixin",
    "check_mixin",
    "has_mixin",
    "original_class",
    "own_forward",
    "remove_mixin",
    "restore_class",
]


class SwapError(ValueError):
    """The class of an object cannot be replaced by a subclass."""


def original_class(obj: object) -> type:
    """The class ``obj`` had before any mixin was added."""
    return getattr(type(obj), "_swapped_from", type(obj))


def has_mixin(obj: object, mixin: type) -> bool:
    """Whether ``mixin`` was added to ``obj`` (by :func:`add_mixin`, not by inheritance)."""
    return mixin in _mixins(obj)


class OwnForward:
    """The innermost mixin of a module whose ``forward`` was set on the instance: runs that one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_own_forward"](*args, **kwargs)


def own_forward(obj: object) -> Callable[..., Any] | None:
    """The ``forward`` that was set on the instance before a mixin came; None where the class's own runs."""
    return vars(obj).get("_own_forward", vars(obj).get("forward"))


def add_mixin(obj: object, mixin: type, name: str = "") -> None:
    """Put ``mixin`` in front of the class of ``obj``; does nothing where it is already there.

    Args:
        obj: any object.
        mixin: the class to put in front.
        name: what an error calls ``obj``; by default its class.

    Raises:
        SwapError: Python does not allow another class for ``obj``.
    """
    if has_mixin(obj, mixin):
        return
    original, mixins = original_class(obj), (mixin, *_mixins(obj))
    owns_forward = "forward" in vars(obj) and _forwarding(mixins) == [mixin]
    try:
        obj.__class__ = _swapped(original, (*mixins, OwnForward) if owns_forward else mixins)
    except Exception as error:  # a metaclass can raise anything
        what = f"{name!r} ({original.__name__})" if name else original.__name__
        raise SwapError(
            f"{what} cannot be changed in place: {error}. Python or the class's own metaclass does not allow a "
            f"subclass of {original.__module__}.{original.__qualname__}: use another class there, or exclude it"
        ) from error
    if owns_forward:
        vars(obj)["_own_forward"] = vars(obj).pop("forward")


def check_mixin(obj: object, mixin: type, name: str = "") -> None:
    """Check that ``obj`` can be given ``mixin``, by doing so and undoing it.

    Raises:
        SwapError: see :func:`add_mixin`.
    """
    if not has_mixin(obj, mixin):
        add_mixin(obj, mixin, name)
        remove_mixin(obj, mixin)


def remove_mixin(obj: object, mixin: type) -> None:
    """Take ``mixin`` away again; the last one gone, the object has its original class."""
    left = tuple(m for m in _mixins(obj) if m is not mixin)
    if _forwarding(left) == [OwnForward]:
        vars(obj)["forward"] = vars(obj).pop("_own_forward")
        left = tuple(m for m in left if m is not OwnForward)
    obj.__class__ = _swapped(original_class(obj), left) if left else original_class(obj)


def restore_class(obj: object) -> None:
    """Take every mixin away."""
    for mixin in _mixins(obj):
        if has_mixin(obj, mixin):  # the innermost goes with the last that it is there for
            remove_mixin(obj, mixin)


def _mixins(obj: object) -> tuple[type, ...]:
    return getattr(type(obj), "_swapped_mixins", ())


def _forwarding(mixins: tuple[type, ...]) -> list[type]:
    return [mixin for mixin in mixins if "forward" in mixin.__dict__]


@functools.cache
def _swapped(original: type, mixins: tuple[type, ...]) -> type:
    namespace = {
        "__slots__": (),  # adds nothing to the layout
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,  # transformers looks a model's class up by str(class)
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_swapped_from": original,
        "_swapped_mixins": mixins,
    }
    if (first := _forwarding(mixins)[:1]) and hasattr(original, "forward"):
        namespace["forward"] = _with_signature(first[0].__dict__["forward"], original.forward)
    # By the original's name: transformers writes it into config.json, and reads kinds of modules from it.
    return _metaclass(type(original))(original.__name__, (original,), namespace)


@functools.cache
def _metaclass(original: type) -> type:
    """A metaclass like ``original`` whose classes resolve attributes in their mixins first."""
    return type(original)(original.__name__, (original,), {"__module__": original.__module__, "mro": _resolution_order})


def _resolution_order(cls: type) -> list[type]:
    own = vars(cls)  # attributes cannot be looked up before the order is known
    if "_swapped_mixins" not in own:  # a subclass that someone else derives, as fully_shard does
        return type.mro(cls)
    inherited = own["_swapped_from"].__mro__
    ahead = [c for mixin in own["_swapped_mixins"] for c in mixin.__mro__ if c not in inherited]
    return [cls, _NoInitSubclass, *dict.fromkeys(ahead), *inherited]


class _NoInitSubclass:
    """Keeps ``__init_subclass__`` of the original from running: a registry, say, would list the subclass."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _with_signature(function: Any, like: Any) -> Any:
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
