"""A griffe extension that prepares docstrings for the API reference.

Docstrings are written for ``help()`` and editors, with the roles and literal blocks of reStructuredText that torch and
Lightning use too. The documentation is Markdown: roles become links to the reference (or code, if the name is not in
it), and ``Example::`` becomes a fenced block. For a method, all of its arguments are shown, including inherited ones,
each with the text of the class that declares it.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import griffe

import lightning_peft as lp

_ROLE = re.compile(r":(?:\w+:)?\w+:`[~!]?([\w.]+)`")
_LITERAL = re.compile(r"^( *)(\S.*)?::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
_ARGUMENTS = re.compile(r"^Args:\n((?: +.*\n|\n)+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^    (\*{0,2}\w.*?): (?:.*\n|\n(?= {8}))(?: {8}.*\n|\n(?= {8}))*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrite the docstrings of the package for the reference."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for cls in map(vars(lp).get, lp.__all__):
            if isinstance(cls, type) and issubclass(cls, lp.PEFTMethod):
                _declare(pkg[f"{cls.__module__}.{cls.__qualname__}".removeprefix(f"{pkg.path}.")], cls)
        _rewrite(pkg)


def markdown(text: str) -> str:
    """A docstring's roles and literal blocks in Markdown.

    Example:
        >>> markdown("See :func:`lightning_peft.rows` and :class:`AdapterRecord`.")
        'See [`rows`][lightning_peft.rows] and `AdapterRecord`.'
    """
    return _LITERAL.sub(_fenced, _ROLE.sub(_link, f"{text}\n")).rstrip("\n")


def _link(role: re.Match[str]) -> str:
    name = role[1].rpartition(".")[2]
    return f"[`{name}`][lightning_peft.{name}]" if name in lp.__all__ else f"`{name}`"


def _fenced(block: re.Match[str]) -> str:
    indent, before, code = block.groups()
    code = textwrap.dedent(code).strip("\n")
    if before == "Example":  # a section that griffe knows, with indented content
        return f"{indent}Example:\n" + textwrap.indent(f"```python\n{code}\n```\n\n", f"{indent}    ")
    return f"{indent}{before or ''}:\n\n" + textwrap.indent(f"```\n{code}\n```\n\n", indent)


def arguments(cls: type[lp.PEFTMethod]) -> dict[str, str]:
    """The description of each argument of ``cls``, in the order of its signature.

    If a class does not describe an argument itself, the text of the nearest base class that does is shown.
    """
    texts: dict[str, str] = {}
    for klass in cls.__mro__:
        section = _ARGUMENTS.search(f"{inspect.cleandoc(vars(klass).get('__doc__') or '')}\n")
        for entry in _ARGUMENT.finditer(section[1] if section else ""):
            texts.setdefault(entry[1].lstrip("*"), entry[0])
    return {name: texts[name] for name in inspect.signature(cls).parameters if name in texts}


def _declare(shown: griffe.Class, cls: type[lp.PEFTMethod]) -> None:
    """Give ``shown`` the signature of ``cls`` and the text of each of its arguments."""
    init = griffe.Function("__init__", parent=shown, parameters=griffe.Parameters(griffe.Parameter("self")))
    for p in inspect.signature(cls).parameters.values():
        kind, default = griffe.ParameterKind(p.kind.description), None if p.default is p.empty else repr(p.default)
        annotation = inspect.formatannotation(p.annotation).strip("'\"")
        init.parameters.add(griffe.Parameter(p.name, annotation=annotation, kind=kind, default=default))
    shown.set_member("__init__", init)
    if shown.docstring is not None and (texts := arguments(cls)):
        section = "Args:\n" + "".join(texts.values()) + "\n"
        shown.docstring.value = _ARGUMENTS.sub(lambda _: section, f"{shown.docstring.value}\n")


def _rewrite(shown: griffe.Object) -> None:
    if shown.docstring is not None:
        shown.docstring.value = markdown(shown.docstring.value)
    for member in shown.members.values():
        if not member.is_alias:
            _rewrite(member)  # type: ignore[arg-type]
