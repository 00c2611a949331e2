"""Convert reST to prose: markup is removed, text stays."""

import pytest

from tools.rst import paragraphs, plain, title

PAGE = """
.. _anchor:

:mod:`box` --- Boxes of things
==============================

.. module:: box
   :synopsis: Boxes.

**Source code:** :source:`Lib/box.py`

--------------

A :class:`~box.Box` holds *things*, as described in :ref:`the guide <guide>`;
open it::

   >>> Box().open()

.. note:: Boxes are not
   thread safe.

Objects
-------

.. class:: Box(size, *,
               lid=True)

   A box of the given ``size``.

   .. versionadded:: 3.2
      The lid.

   * It can be opened.
   * It can be closed.

======  =====
Size    Price
======  =====

.. code-block:: python

   box = Box()

   box.open()

The end [1]_.
"""


def test_title_is_the_first_heading():
    assert title(PAGE) == "box --- Boxes of things"
    assert title("No heading.") == ""


def test_paragraphs_are_the_prose_and_nothing_else():
    assert list(paragraphs(PAGE)) == [
        ("box --- Boxes of things", "A Box holds things, as described in the guide; open it"),
        ("box --- Boxes of things", "Boxes are not thread safe."),
        ("Objects", "A box of the given size."),
        ("Objects", "It can be opened."),
        ("Objects", "It can be closed."),
        ("Objects", "The end ."),
    ]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (":func:`os.path.join`", "os.path.join"),
        (":meth:`~io.RawIOBase.read`", "read"),
        ("``a * b`` and **bold**", "a * b and bold"),
        ("`PyPI <https://pypi.org>`_", "PyPI"),
        (r"a :class:`str`\ s", "a strs"),
        ("2 * 3 * 4", "2 * 3 * 4"),
        ("see [2]_ now", "see now"),
    ],
)
def test_plain(markup, text):
    assert plain(markup) == text
