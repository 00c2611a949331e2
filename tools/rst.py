"""Convert reStructuredText to plain paragraphs, for the constructs that Python's documentation uses.

This is not a complete parser. Docutils would need Sphinx's directives and roles, and would build a document tree
to be flattened. Only the prose is needed, without code, tables, signatures and markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Directives that contain only prose, which may start on their first line.
_NOTES = re.compile(r"note|warning|seealso|impl-detail|tip|important|hint")
# Directives whose body is prose. Their first line is a signature, and is dropped.
_DESCRIPTIONS = re.compile(
    r"(?:c|py):\w+|\w*(?:function|method|class|attribute|decorator)|c?(?:var|type|member|macro)|cmdoption|coroutine"
    r"|data|describe|envvar|exception|object|opcode|option|pdbcommand|program-option"
)

_DIRECTIVE = re.compile(r"\.\. +([A-Za-z:\-]+)::")
_ADORNMENT = re.compile(r"([=\-~^\"'*+#.`:_])\1{2,}$")
_LIST_MARK = re.compile(r"^(?:[*\-] |#\. |\d+\. |\(?[a-z0-9]\) )\s*")
_FIELD = re.compile(r"^:[a-z][a-z ]*[^:`]*:(?:\s|$)")
_NOT_PROSE = ("**Source code:**", "----", ">>>")
_TABLE = re.compile(r"^(?:\+[-=+]|\||={2,} +=|-{2,} +-|={5,}$)")

_INLINE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\ ", ""),  # an escape that only ends the markup before it
        (r"\\([*`|_\\])", r"\1"),
        (r"\[(?:#\w*|\d+|[A-Z]\w*)\]_", ""),  # footnotes and citations
        (r"\|(\w+)\|", r"\1"),  # substitutions
        (r":[\w:+\-]+:`[!~]?([^`<]*?)\s*<[^`]*>`", r"\1"),  # :role:`text <target>`
        (r":[\w:+\-]+:`~[\w.]*?([^`.]*)`", r"\1"),  # :role:`~a.b.name`
        (r":[\w:+\-]+:`!?\.?([^`]*)`", r"\1"),  # :role:`name`
        (r"`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\1"),  # `text <url>`_
        (r"``(.+?)``", r"\1"),
        (r"`([^`]+)`_{0,2}", r"\1"),
        (r"\*\*(\S(?:.*?\S)?)\*\*", r"\1"),
        (r"(?<![\w*])\*(\S(?:[^*]*?\S)?)\*(?![\w*])", r"\1"),
        (r"\s+", " "),
    )
)


def plain(text: str) -> str:
    """Strip inline markup: roles, emphasis, literals, links, footnote marks.

    Example:
        >>> plain("The :class:`~io.BytesIO` object *buf* (see :ref:`the guide <x>`) is ``b''``.")
        "The BytesIO object buf (see the guide) is b''."
    """
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text.strip()


def paragraphs(source: str) -> Iterator[tuple[str, str]]:
    """Yield ``(section, paragraph)`` for each paragraph of prose, in order.

    Args:
        source: The text of one reST file.

    Yields:
        The plain title of the section the paragraph is in (empty before the first), and its plain text on one
        line. Code, tables, signatures, comments, field lists and "new in version" notes are left out.
    """
    section = ""
    skip_deeper_than: int | None = None  # lines that are indented deeper belong to a body that is not prose
    for block in _blocks(source):
        indent = _indent(block[0])
        if skip_deeper_than is not None:
            if indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        if title := _title(block):
            section = plain(title)
            continue
        first = block[0].strip()
        if first.startswith(".."):
            directive = _DIRECTIVE.match(first)
            name = directive[1] if directive else ""
            if not _NOTES.fullmatch(name):
                # The first lines of a description are signatures and options; its prose follows in the next block.
                skip_deeper_than = None if _DESCRIPTIONS.fullmatch(name) else indent
                continue
            block = [first[len(f".. {name}::") :], *block[1:]]
            if not (first := " ".join(block).strip()):
                continue
        if first.startswith(_NOT_PROSE) or _TABLE.match(first) or _FIELD.match(first):
            continue
        text = " ".join(line.strip() for line in block)
        if text.endswith("::"):
            skip_deeper_than = indent
            text = text[:-2].rstrip() + ("" if text[:-2].endswith((" ", "\t")) else ":")
        if text := plain(_LIST_MARK.sub("", text)).rstrip(":"):
            yield section, text


def title(source: str) -> str:
    """The first section title of a page as plain text; empty if there is none."""
    return next((plain(found) for block in _blocks(source) if (found := _title(block))), "")


def _blocks(source: str) -> Iterator[list[str]]:
    """Blocks of lines between blank lines; a list item or a directive also starts a new block."""
    block: list[str] = []
    for line in [*source.expandtabs(8).splitlines(), ""]:
        starts_new = bool(_LIST_MARK.match(line.strip())) or line.lstrip().startswith(".. ")
        if block and (not line.strip() or starts_new):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _title(block: list[str]) -> str | None:
    lines = [line.strip() for line in block]
    if len(lines) == 3 and _ADORNMENT.match(lines[0]) and lines[0] == lines[2]:
        return lines[1]
    if len(lines) == 2 and _ADORNMENT.match(lines[1]) and len(lines[1]) >= len(lines[0]) - 2:
        return lines[0]
    return None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
