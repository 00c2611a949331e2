"""Choose which arguments of a module its checkpoint may supply.

Every command and ``lp.load_from_checkpoint`` follow one rule: a checkpoint supplies plain values only. The user must
pass anything that could be imported or called (a class path, a callable, an argument that takes an object) and any
argument that the class lists in ``from_user``. A file never overrides an argument that the user passes.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import types
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from lightning.fabric.utilities.data import AttributeDict
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from lightning_peft.core.state.state_dict import StateError
from lightning_peft.trainer.checkpoints.unsafe_hparams import unread_hparams

__all__ = ["names_code", "parameters_of", "saved_arguments", "takes_any"]

#: keys that make jsonargparse and Hydra build a class, even inside a string, because they parse strings as YAML
_CLASS_KEYS = ("class_path", "_target_")
_DOTTED = re.compile(r"[^\W\d]\w*(?:[.:][^\W\d]\w*)+")
_CONTAINERS = (list, dict, tuple, set, frozenset, Sequence, Mapping, Iterable)
_PLAIN = (int, float, complex, bool, str, bytes, Path)


def saved_arguments(
    module_class: type,
    checkpoint: Mapping[str, Any],
    given: Mapping[str, Any],
    where: str | Path,
    trusted: bool = False,
) -> dict[str, Any]:
    """Return the arguments of ``module_class`` that the checkpoint supplies in addition to those from the user.

    If an argument that the user passes differs from the saved one, it is used and a warning names both values.

    Args:
        module_class: The class that the user named.
        checkpoint: The loaded checkpoint, with its ``hyper_parameters``.
        given: The user's arguments.
        where: The checkpoint's path, for messages.
        trusted: Whether objects that were read from the file may be used.

    Raises:
        StateError: if the hyperparameters are not a dictionary, or if one that the user did not pass names code.
    """
    saved = checkpoint.get("hyper_parameters") or {}
    if not isinstance(saved, Mapping) or not all(isinstance(name, str) for name in saved):
        raise StateError(
            f"{where}: its hyper_parameters are not a dictionary of arguments by name. The Trainer always writes one, "
            "so the file was edited or is damaged: use another copy"
        )
    accepted = parameters_of(module_class)
    saved = _as_one_argument(saved, checkpoint.get("hparams_name"), accepted)
    _check_apart(unread_hparams(checkpoint), checkpoint.get("hparams_name"), accepted, given, where)
    open_ended = takes_any(module_class)
    found, refused = {}, {}
    for name, value in saved.items():
        parameter = accepted.get(name)
        if name.startswith("_") or (parameter is None and not open_ended):
            continue
        if name in given:
            if not _equal(given[name], value):
                shown = _shown(given[name])
                rank_zero_warn(f"{name}={shown} was given and is used; {where} was saved with {_shown(value)}")
        elif parameter is not None and _equal(parameter.default, value):
            continue
        elif (
            name in getattr(module_class, "from_user", ())
            or names_code(value)
            or not (trusted or _takes_plain(parameter))
        ):
            refused[name] = value
        else:
            found[name] = value
    if refused:
        said = ", ".join(f"{name}={_shown(value)}" for name, value in refused.items())
        path = f"{module_class.__module__}.{module_class.__qualname__}"
        local = path.startswith("__main__") or "<" in path  # other programs cannot import it
        flags = " ".join([f"--model {'my.package.Module' if local else path}", *(f"--model.{n}=..." for n in refused)])
        raise StateError(
            f"{where} was saved with {said}. Names in files are never imported, called or opened: pass these "
            f"arguments yourself ({flags} on the command line, {', '.join(f'{n}=...' for n in refused)} in Python)"
        )
    return found


def _as_one_argument(saved: Mapping[str, Any], name: Any, accepted: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return ``saved``; after ``save_hyperparameters(args)``, return it as the single argument ``args``."""
    if name not in accepted:
        return dict(saved)
    as_namespace = accepted[name].annotation is Namespace
    return {name: Namespace(**saved) if as_namespace else _attributes(saved)}


def _attributes(value: Any) -> Any:
    """Convert nested dictionaries to ``AttributeDict``, so that entries are attributes, as in ``hparams``."""
    if isinstance(value, Mapping):
        return AttributeDict({k: _attributes(v) for k, v in value.items()})
    return [_attributes(v) for v in value] if isinstance(value, list) else value


def _check_apart(
    names: list[str], whole: Any, accepted: Mapping[str, Any], given: Mapping[str, Any], where: str | Path
) -> None:
    """Refuse to build a module if hyperparameters were not read from the file and the user did not pass them.

    The class's defaults are not used in their place: the module would then differ silently from the trained one.
    """
    needed = [whole] if names and whole in accepted else [name for name in names if name in accepted]
    if missing := [name for name in needed if name not in given]:
        raise StateError(
            f"{where}: the hyperparameters {', '.join(map(ascii, names))} are objects, which are not read from files. "
            f"Pass them yourself ({', '.join(f'{n}=...' for n in missing)}), or read the file with weights_only=False "
            "if you trust it"
        )


def names_code(value: Any) -> bool:
    """Whether ``value`` is or contains a name that could be imported; imports nothing itself."""
    try:
        return _names_code(value)
    except RecursionError:  # a pickle can hold a list that contains itself
        return True


def _names_code(value: Any) -> bool:
    if isinstance(value, str):
        return any(key in value for key in _CLASS_KEYS) or _importable(value.strip())
    value = vars(value) if isinstance(value, Namespace) else value
    if isinstance(value, Mapping):
        return any(_names_code(part) for pair in value.items() for part in pair)
    return isinstance(value, list | tuple | set | frozenset) and any(map(_names_code, value))


def _importable(text: str) -> bool:
    if not _DOTTED.fullmatch(text):
        return False
    package, inside = re.split("[.:]", text)[:2]
    try:
        # For a top-level name, find_spec imports nothing. For "a.b" it would import a, so only the first part is asked.
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, such as __main__
        return True
    if spec is None:
        return False
    folders = spec.submodule_search_locations
    # A folder without __init__.py, such as data/, is a namespace package: "data.csv" is then a file name, not code.
    if spec.origin is None and folders is not None:
        return PathFinder.find_spec(f"{package}.{inside}", list(folders)) is not None
    return True


def takes_any(module_class: type) -> bool:
    """Whether ``__init__`` of ``module_class`` has ``**kwargs``."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module_class).parameters.values())


def parameters_of(module_class: type) -> dict[str, inspect.Parameter]:
    """The parameters of ``__init__`` by name, including those of base classes that ``**kwargs`` may reach."""
    found: dict[str, inspect.Parameter] = {}
    for cls in module_class.__mro__:
        init = vars(cls).get("__init__")
        if init is None or cls is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            hint = parameter.annotation
            if isinstance(hint, str):  # an annotation in the user's own source, never text from a checkpoint
                try:
                    hint = eval(hint, dict(vars(inspect.getmodule(cls))))
                except Exception:
                    hint = object
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter.replace(annotation=hint))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _takes_plain(parameter: inspect.Parameter | None) -> bool:
    """Whether the argument takes plain values only, so that jsonargparse never builds an object from its value."""
    return parameter is None or parameter.annotation is parameter.empty or _is_plain(parameter.annotation)


def _is_plain(hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal or hint in (Any, None, type(None), ..., *_PLAIN, *_CONTAINERS):
        return True
    if origin is Annotated:
        return _is_plain(inside[0])
    if origin in (Union, types.UnionType, *_CONTAINERS):
        return all(map(_is_plain, inside))
    return isinstance(hint, type) and issubclass(hint, (Enum, Namespace))


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(type(one) is type(other) and one == other) or (
            isinstance(one, list | tuple) and isinstance(other, list | tuple) and list(one) == list(other)
        )
    except Exception:  # comparing tensors or arrays returns an array, whose truth value raises
        return False


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
