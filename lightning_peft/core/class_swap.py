"""Add a mixin to one object by swapping its class in place.

The object keeps its identity, attributes, parameter names and ``isinstance`` relations. Only its class changes, to a
cached subclass of the original with the mixins first in the method resolution order. torch's ``fully_shard`` and
``parametrize`` work the same way. The alternative, a wrapper module, would rename every parameter and leave other
references to the module pointing at the original. Copying and pickling work, because the subclass is rebuilt from the
original class and the mixins.

Python allows the swap only between classes with the same memory layout, and a class has the layout of its first base.
So the original is the only base of the subclass, and a metaclass inserts the mixins into the resolution order. If the
mixins were bases before the original, they would change the layout of an original that derives from ``ABC``,
``Generic`` or a class with ``__slots__``.

A ``forward`` that is set on the instance (accelerate's hooks, fused kernels) would hide a mixin's ``forward``. If it
was set before the first such mixin, it runs inside the mixin, instead of the class's ``forward``; see
:class:`OwnForward`. While it runs, ``self.__class__.forward`` is the original one, because some of these functions call
it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

__all__ = [
    "OwnForward",
    "SwapError",
    "add_mixin",
    "changed_class",
    "check_mixin",
    "has_mixin",
    "is_swapped",
    "original_class",
    "own_forward",
    "remove_mixin",
    "replace_class",
    "restore_class",
]


class SwapError(ValueError):
    """The class of an object cannot be swapped for a subclass."""


def original_class(obj: object) -> type:
    """Return the class of ``obj`` before any mixin was added."""
    return getattr(type(obj), "_swapped_from", type(obj))


def has_mixin(obj: object, mixin: type) -> bool:
    """Whether ``mixin`` was added to ``obj`` by :func:`add_mixin`; inherited classes do not count."""
    return mixin in _mixins(obj)


def is_swapped(obj: object) -> bool:
    """Whether the class of ``obj`` was made by :func:`add_mixin`, and is not a later subclass of such a class."""
    return "_swapped_from" in vars(type(obj))


# The objects whose own forward runs, by id: of this thread, because one model can serve several threads.
_IN_OWN_FORWARD: ContextVar[frozenset[int]] = ContextVar("in_own_forward", default=frozenset())


class OwnForward:
    """The innermost mixin of a module whose ``forward`` was set on the instance; it calls that ``forward``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # compiled code cannot read a ContextVar
            return self.__dict__["_own_forward"](*args, **kwargs)
        token = _IN_OWN_FORWARD.set(_IN_OWN_FORWARD.get() | {id(self)})
        try:
            return self.__dict__["_own_forward"](*args, **kwargs)
        finally:
            _IN_OWN_FORWARD.reset(token)


def own_forward(obj: object) -> Callable[..., Any] | None:
    """Return the ``forward`` that was set on the instance before any mixin was added; None if there is none."""
    return vars(obj).get("_own_forward", vars(obj).get("forward"))


def add_mixin(obj: object, mixin: type, name: str = "") -> None:
    """Add ``mixin`` in front of the class of ``obj``; do nothing if it was already added.

    Args:
        obj: any object.
        mixin: the class whose methods take precedence.
        name: the name of ``obj`` in error messages; by default, its class.

    Raises:
        SwapError: if Python does not allow the class of ``obj`` to be changed.
    """
    if has_mixin(obj, mixin):
        return
    original, mixins = original_class(obj), (mixin, *_mixins(obj))
    # Only the first mixin with a forward moves the instance's own forward aside; later ones find it there.
    owns_forward = "forward" in vars(obj) and _forwarding(mixins) == [mixin]
    try:
        _set_class(obj, _swapped(original, (*mixins, OwnForward) if owns_forward else mixins))
    except Exception as error:  # a metaclass can raise anything
        what = f"{name!r} ({original.__name__})" if name else original.__name__
        raise SwapError(
            f"{what} cannot be changed in place: {error}. Python or the class's own metaclass does not allow a "
            f"subclass of {original.__module__}.{original.__qualname__}. Use a different class, or exclude the module"
        ) from error
    if owns_forward:
        vars(obj)["_own_forward"] = vars(obj).pop("forward")


def check_mixin(obj: object, mixin: type, name: str = "") -> None:
    """Check that ``mixin`` can be added to ``obj``, by adding and removing it.

    Only a trial shows this, because a metaclass may run any code when a subclass is created.

    Raises:
        SwapError: if :func:`add_mixin` raises it.
    """
    if not has_mixin(obj, mixin):
        add_mixin(obj, mixin, name)
        remove_mixin(obj, mixin)


def remove_mixin(obj: object, mixin: type) -> None:
    """Remove ``mixin``; without any mixin, the object has its original class again."""
    left = tuple(m for m in _mixins(obj) if m is not mixin)
    # If no other mixin has a forward, nothing would be hidden, so the instance's own forward goes back to its place.
    if _forwarding(left) == [OwnForward]:
        vars(obj)["forward"] = vars(obj).pop("_own_forward")
        left = tuple(m for m in left if m is not OwnForward)
    _set_class(obj, _swapped(original_class(obj), left) if left else original_class(obj))


def _set_class(obj: object, cls: type) -> None:
    object.__setattr__(obj, "__class__", cls)  # not the class's own __setattr__, which may refuse unknown names


def restore_class(obj: object) -> None:
    """Remove every mixin."""
    for mixin in _mixins(obj):
        if has_mixin(obj, mixin):  # OwnForward is removed together with the last mixin that needs it
            remove_mixin(obj, mixin)


def replace_class(obj: object, original: type) -> None:
    """Make ``obj`` an instance of another class; its mixins stay."""
    mixins = _mixins(obj)
    obj.__class__ = _swapped(original, mixins) if mixins else original


def _mixins(obj: object) -> tuple[type, ...]:
    return getattr(type(obj), "_swapped_mixins", ())


def _forwarding(mixins: tuple[type, ...]) -> list[type]:
    return [mixin for mixin in mixins if "forward" in mixin.__dict__]


# Cached, so that modules of one class also have one class after the swap: wrap policies and kernels compare classes.
@functools.cache
def _swapped(original: type, mixins: tuple[type, ...]) -> type:
    namespace = {
        "__slots__": (),  # keeps the memory layout of the original
        "__module__": original.__module__,
        # Marked as a class made in a function, because jsonargparse finds classes by name among all subclasses and
        # skips such classes. str(class) does not change; see _metaclass.
        "__qualname__": f"add_mixin.<locals>.{original.__qualname__}",
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_swapped_from": original,
        "_swapped_mixins": mixins,
    }
    if (first := _forwarding(mixins)[:1]) and hasattr(original, "forward"):
        forward = first[0].__dict__["forward"]
        if OwnForward in mixins:
            forward = _unless_in_own_forward(forward, original.forward)
        namespace["forward"] = _with_signature(forward, original.forward)
    # The subclass has the original's name and str(class), because transformers writes class names to config.json,
    # compares them, and looks up by str(class) what a model records.
    return _metaclass(type(original))(original.__name__, (original,), namespace)


@functools.cache
def _metaclass(original: type) -> type:
    """Return a metaclass derived from ``original`` whose classes resolve attributes in their mixins first."""

    def represent(cls: type) -> str:
        return original.__repr__(vars(cls).get("_swapped_from", cls))  # type: ignore[call-arg]  # unbound

    namespace = {
        "__module__": original.__module__,
        "mro": _resolution_order,
        "__repr__": represent,
        "__delattr__": _delete_of_class,
    }
    return type(original)(original.__name__, (original,), namespace)


def _delete_of_class(cls: Any, name: str) -> None:
    """Refuse to delete an attribute of the original class, as torch does to remove a parametrization."""
    if "_swapped_from" in vars(cls) and name not in vars(cls) and name in vars(cls._swapped_from):
        raise SwapError(changed_class(cls, name))
    type.__delattr__(cls, name)


def changed_class(cls: type, name: str) -> str:
    """The error text for code that changes the class of an object with mixins in order to change ``name``."""
    return (
        f"{name!r} of this {cls.__name__} cannot be changed: the layer has adapters, and code that removes a "
        "parametrization or a property changes its class. Call lp.unload(model) (with merge=True to keep the adapters' "
        "effect) first, and apply the methods again after the change"
    )


def _resolution_order(cls: type) -> list[type]:
    own = vars(cls)  # ordinary attribute lookup needs the order that is being computed here
    if "_swapped_mixins" not in own:  # a further subclass that other code creates, as fully_shard does
        return type.mro(cls)
    inherited = own["_swapped_from"].__mro__
    ahead = [c for mixin in own["_swapped_mixins"] for c in mixin.__mro__ if c not in inherited]
    return [cls, _NoInitSubclass, *dict.fromkeys(ahead), *inherited]


class _NoInitSubclass:
    """Keeps ``__init_subclass__`` of the original from running, which could add the subclass to a registry."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _unless_in_own_forward(adapted: Any, original: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and id(self) in _IN_OWN_FORWARD.get():
            return original(self, *args, **kwargs)
        return adapted(self, *args, **kwargs)

    return forward


def _with_signature(function: Any, like: Any) -> Any:
    """Return a copy of ``function`` with the signature of ``like``.

    Callers inspect the signature of ``forward`` to find out which arguments they may pass.
    """
    # A copy, because all swapped classes share the mixin's function, and each needs the signature of its original.
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = like.__qualname__
    copy.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return copy


def _reduce_ex(self: Any, protocol: Any) -> tuple:
    # The default reduction stores the name of the class, which cannot be imported. Store what it is built from instead.
    rest = tuple(object.__reduce_ex__(self, 2))[2:]
    return (_rebuild, (original_class(self), _mixins(self)), *rest)


def _rebuild(original: Any, mixins: tuple[type, ...]) -> object:
    return original.__new__(_swapped(original, mixins))
