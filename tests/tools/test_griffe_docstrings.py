"""How docstrings appear in the API reference. Needs the packages that build the documentation."""

from __future__ import annotations

import inspect
import re

import pytest

import lightning_peft as lp

pytest.importorskip("griffe")

from tools.griffe_docstrings import arguments, markdown


def test_roles_become_links_or_code():
    text = "See :class:`lightning_peft.PEFTMethod`, :func:`~a.b.helper` and :meth:`build`."
    assert markdown(text) == "See [`PEFTMethod`][lightning_peft.PEFTMethod], `helper` and `build`."


def test_literal_blocks_become_fenced_code():
    text = "One.\n\nExample::\n\n    a = 1\n\n    if a:\n        b = 2\n\nAs in::\n\n    c\n\nEnd."
    shown = "One.\n\nExample:\n    ```python\n    a = 1\n\n    if a:\n        b = 2\n    ```\n\nAs in:\n\n```\nc\n```"
    assert markdown(text) == f"{shown}\n\nEnd."


@pytest.mark.parametrize("name", lp.__all__)
def test_no_docstring_keeps_what_markdown_does_not_know(name):
    shown = markdown(inspect.getdoc(getattr(lp, name)) or "")
    prose = re.sub(r"```.*?```", "", shown, flags=re.DOTALL)
    assert not re.search(r":\w+:`|::$|^\.\. ", prose, re.MULTILINE)


def test_arguments_come_from_the_class_that_describes_them():
    own, inherited = arguments(lp.LoHa), arguments(lp.PEFTMethod)
    assert list(own)[:2] == ["r", "alpha"]
    assert own["trainable"] == inherited["trainable"]
    assert "rank" in own["r"]


@pytest.mark.parametrize("method", [m for m in map(vars(lp).get, lp.__all__) if hasattr(m, "may_change")])
def test_every_argument_has_a_text(method):
    assert not inspect.signature(method).parameters.keys() - arguments(method).keys()
