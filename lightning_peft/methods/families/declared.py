"""Declare a method's arguments once, as fields; constructor, checks, YAML and ``--help`` are derived from them.

    r: int = field(default=8, validator=positive_int, kw_only=False)
    lora_plus_ratio: float | None = field(default=None, validator=optional(positive))
    rank_pattern: Mapping[str, int] | None = field(default=None, converter=as_dict, validator=each(positive_int))
    bias: Literal["none", "lora_only", "all"] = "none"

Describe each argument in the class docstring's ``Args:``. Arguments are keyword-only unless ``kw_only=False``. Values
of ``Literal`` and ``bool`` fields are checked against the annotation, so they need no ``field``. Checks of numbers are
in :mod:`lightning_peft.methods.families.arguments`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import attrs
from attrs import Attribute, Converter, field
from typing_extensions import dataclass_transform

from lightning_peft.core.targeting.patterns import as_patterns
from lightning_peft.methods.families.arguments import Check, one_of
from lightning_peft.methods.families.unknown_arguments import advice

__all__ = ["Declared", "target_patterns"]


@dataclass_transform(eq_default=False, kw_only_default=True, field_specifiers=(attrs.field, field))
class Declared:
    """Base of the classes that declare their arguments as fields; a subclass needs no decorator.

    A subclass with a handwritten ``__init__`` has no fields; it passes other arguments to ``super().__init__``.
    """

    __attrs_attrs__: ClassVar[tuple[Attribute[Any], ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        constructed_by = next(c for c in cls.__mro__ if "__init__" in c.__dict__)
        if constructed_by is cls or constructed_by.__dict__.get("__attrs_attrs__") == ():
            if any(isinstance(value, type(field())) for value in cls.__dict__.values()):
                raise TypeError(
                    f"{cls.__name__} declares fields, but {constructed_by.__name__} has a handwritten __init__, which "
                    "would not set them: declare every argument as a field instead"
                )
            # Without fields, jsonargparse reads this constructor and follows its **kwargs to the parents' constructors.
            cls.__attrs_attrs__ = ()
            return
        # Applied here, because a subclass that forgot a decorator would silently lose its arguments.
        attrs.define(
            cls,
            slots=False,  # with slots=True, attrs would return a copy of the class
            eq=False,
            repr=False,
            kw_only=True,
            on_setattr=attrs.setters.NO_OP,  # otherwise attrs would replace this class's __setattr__
            field_transformer=_with_type_checks,
        )
        cls.__init__ = _naming_unknown(cls.__init__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _strip_numpy(value))

    def __attrs_post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check combinations of arguments; the constructor calls this after checking each argument.

        Raises:
            ValueError: if arguments contradict each other.
        """

    def config(self) -> dict[str, Any]:
        """All arguments by name, as plain values from which the object can be rebuilt."""
        return {name: getattr(self, name) for name in _arguments(type(self))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


def _naming_unknown(init: Callable[..., None]) -> Callable[..., None]:
    """``init`` with an error for an unknown keyword that names the argument that was probably meant."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)  # its signature is read by jsonargparse and editors
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} does not have an argument {name!r}: {advice(name, known, value)}"
                )
        init(self, *args, **kwargs)

    return checked


def _arguments(cls: type) -> list[str]:
    """The names of the constructor's arguments, including those that a handwritten one passes on as ``**kwargs``."""
    names: dict[str, None] = {}
    for klass in cls.__mro__:
        init = klass.__dict__.get("__init__")
        if init is None or not issubclass(klass, Declared):
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        names |= {p.name: None for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _with_type_checks(cls: type, fields: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """Add type checks to the fields, and order them: first those of the family, then those of the method, then those
    that all methods share.

    A redeclared field keeps its position, and its converter and validator unless it declares new ones.
    """
    parents = [c for c in cls.__mro__[1:] if attrs.has(c) and attrs.fields(c)]
    inherited = {a.name: a for a in attrs.fields(parents[0])} if parents else {}
    options = [a.name for a in attrs.fields(parents[-1])] if parents else []
    own = inspect.get_annotations(cls)
    new = [a.name for a in fields if a.name not in inherited]
    order = [*(name for name in inherited if name not in options), *new, *options]
    return sorted(
        (_checked(cls, a, inherited.get(a.name)) if a.name in own else a for a in fields),
        key=lambda a: order.index(a.name),
    )


def _checked(cls: type, argument: Attribute[Any], before: Attribute[Any] | None) -> Attribute[Any]:
    if before is not None:
        argument = argument.evolve(
            kw_only=before.kw_only and argument.kw_only,
            converter=argument.converter or before.converter,
            validator=argument.validator or before.validator,
        )
    annotated = type("", (), {"__annotations__": {argument.name: argument.type}})
    try:
        hint = get_type_hints(annotated, vars(sys.modules[cls.__module__]))[argument.name]
    except NameError:  # the annotation uses a name imported under TYPE_CHECKING only
        return argument
    checks = [check for check in (_check_of_type(hint), argument.validator) if check is not None]
    # Store the type itself: its name may not be defined in the module of a subclass.
    return argument.evolve(type=hint, validator=attrs.validators.and_(*checks) if checks else None)


def _check_of_type(hint: Any) -> Check | None:
    if hint is bool:
        return Check("True or False", lambda value: isinstance(value, bool))
    return one_of(*get_args(hint)) if get_origin(hint) is Literal else None


def _strip_numpy(value: Any) -> Any:
    """``value`` with numpy scalars converted to Python ones; ``weights_only`` loading rejects numpy scalars."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_strip_numpy, value))
    if type(value) is dict:
        return {_strip_numpy(k): _strip_numpy(v) for k, v in value.items()}
    return value


def _patterns(value: Any, argument: Attribute[Any]) -> str | list[str]:
    checked = as_patterns(value, argument.name)
    return value if isinstance(value, str) else list(checked)


#: converter for fields that hold target patterns; raises TargetError for a malformed pattern
target_patterns = Converter(_patterns, takes_field=True)  # type: ignore[misc]
