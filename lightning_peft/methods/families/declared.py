"""How a method declares its arguments: one field each, which the constructor, the checks, YAML and `--help` follow.

    r: int = field(default=8, validator=positive_int, kw_only=False)
    lora_plus_ratio: float | None = field(default=None, validator=optional(positive))
    rank_pattern: Mapping[str, int] | None = field(default=None, converter=as_dict, validator=each(positive_int))
    bias: Literal["none", "lora_only", "all"] = "none"

The texts stand in the class docstring's ``Args:``. Arguments are keyword-only unless ``kw_only=False``. The values of a
``Literal`` and of a ``bool`` are checked by their type, so they need no ``field``. The checks of numbers are in
:mod:`lightning_peft.methods.families.arguments`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import attrs
from attrs import Attribute, Converter, field
from typing_extensions import dataclass_transform

from lightning_peft.core.targeting.patterns import as_patterns
from lightning_peft.methods.families.arguments import Check, one_of

__all__ = ["Declared", "target_patterns"]


@dataclass_transform(eq_default=False, kw_only_default=True, field_specifiers=(attrs.field, field))
class Declared:
    """Base of the classes whose arguments are declared as fields; a subclass needs no decorator.

    One that writes its own ``__init__`` has no fields, and passes what it does not know to ``super().__init__``.
    """

    __attrs_attrs__: ClassVar[tuple[Attribute[Any], ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        constructed_by = next(c for c in cls.__mro__ if "__init__" in c.__dict__)
        if constructed_by is cls or constructed_by.__dict__.get("__attrs_attrs__") == ():
            if any(isinstance(value, type(field())) for value in cls.__dict__.values()):
                raise TypeError(
                    f"{cls.__name__} declares fields, and {constructed_by.__name__} has an __init__ of its own, which "
                    "would not set them: declare every argument as a field instead"
                )
            # No fields, so that jsonargparse reads the constructor and those behind its **kwargs.
            cls.__attrs_attrs__ = ()
            return
        # Here and not by a decorator, which a subclass could forget and silently lose its arguments.
        attrs.define(
            cls,
            slots=False,  # a class with slots would be a copy of this one
            eq=False,
            repr=False,
            kw_only=True,
            on_setattr=attrs.setters.NO_OP,  # values pass through __setattr__ below
            field_transformer=_with_type_checks,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _strip_numpy(value))

    def __attrs_post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse arguments that are valid one by one and do not fit together; called by the constructor.

        Raises:
            ValueError: names the arguments.
        """

    def config(self) -> dict[str, Any]:
        """Every argument by name, as plain values: enough to build this object again."""
        return {name: getattr(self, name) for name in _arguments(type(self))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


def _arguments(cls: type) -> list[str]:
    """The names of the constructor's arguments; those behind ``**kwargs`` of a hand-written one as well."""
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
    """The fields with the checks of their types, in the order family, method, options of every method.

    A redeclared field keeps its place, and its converter and checks unless it brings its own.
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
    except NameError:  # a name that only type checkers import
        return argument
    checks = [check for check in (_check_of_type(hint), argument.validator) if check is not None]
    # With the type itself, since its name may mean nothing where a subclass is defined.
    return argument.evolve(type=hint, validator=attrs.validators.and_(*checks) if checks else None)


def _check_of_type(hint: Any) -> Check | None:
    if hint is bool:
        return Check("True or False", lambda value: isinstance(value, bool))
    return one_of(*get_args(hint)) if get_origin(hint) is Literal else None


def _strip_numpy(value: Any) -> Any:
    """``value`` with Python numbers and strings for numpy scalars, which would make a checkpoint unreadable."""
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


#: converter of a field that holds target patterns; a malformed one is a TargetError
target_patterns = Converter(_patterns, takes_field=True)  # type: ignore[misc]
