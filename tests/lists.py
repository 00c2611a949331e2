"""Generate the lists of methods from the classes: ``python -m tests.lists`` writes them.

They are the exports of ``lightning_peft/__init__.py``; the lists in the documentation between ``<!-- list: NAME -->``
and ``<!-- end -->``; docs/support.md; and a section of recipes/methods.yaml for each method without one. A new method
needs no edit there. ``tests/test_lists.py`` fails if one of them is out of date.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

import lightning_peft as lp
import lightning_peft.methods
from lightning_peft.cli.methods import command_name, exported
from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.batching.batched import BatchedLowRank, PerGroupOutput
from lightning_peft.trainer.logs import keys
from lightning_peft_command.settings import read_settings
from tests import features, packed_methods, strategies
from tests.holes import REFUSED
from tests.kinds import KINDS
from tests.table import METHODS, Row

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXPORTS = ROOT / "lightning_peft" / "__init__.py"
SETTINGS = ROOT / "recipes" / "methods.yaml"


def defined() -> list[type[lp.PEFTMethod]]:
    """The methods of the files in lightning_peft/methods, whether they are exported or not."""
    modules = [m for m in pkgutil.iter_modules(lightning_peft.methods.__path__) if not m.ispkg]
    found = {}
    for info in modules:
        module = importlib.import_module(f"lightning_peft.methods.{info.name}")
        for name, value in vars(module).items():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, lp.PEFTMethod) and not inspect.isabstract(value):
                found[name] = value
    return list(found.values())


def exports() -> str:
    """The package's ``__init__.py`` with every method imported and in ``__all__``, sorted as ruff sorts them."""
    text = EXPORTS.read_text()
    imports = re.findall(r"^from lightning_peft\..*\n", text, re.MULTILINE)
    names = re.findall(r'^    "\w+",\n', text, re.MULTILINE)
    for method in defined():
        if f'    "{method.__name__}",\n' not in names:
            imports.append(f"from {method.__module__} import {method.__name__}\n")
            names.append(f'    "{method.__name__}",\n')
    start, end = text.index("from lightning_peft."), text.index("\n__version__")
    begin = text.index("__all__ = [\n")
    names.sort(key=lambda line: (0 if line.isupper() else 1 if line[5].isupper() else 2, line))
    return (
        f"{text[:start]}{''.join(sorted(imports, key=lambda line: line.split()[1]))}{text[end:begin]}__all__ = [\n"
        + (f"{''.join(names)}]\n")
    )


def _sentence(method: type[lp.PEFTMethod], begins: str, ends: str) -> str:
    """The part of a method's docstring after ``begins``, as Markdown; an error if the docstring does not have it."""
    text = " ".join((inspect.getdoc(method) or "").split())
    found = re.search(rf"{begins} (.*?){ends}", text)
    if found is None:
        raise ValueError(f"the docstring of {method.__name__} has no sentence {begins!r}, which docs/methods.md shows")
    return re.sub(r":\w+:`~?lightning_peft\.([^`]+)`", r"`lp.\1`", found[1]).replace("``", "`")


def _merges(method: type[lp.PEFTMethod]) -> str:
    (row, *_) = (row for made_by, _, row in _rows() if made_by is method)
    return "nothing to merge" if row.selects else "yes" if row.mergeable else "no"


def choice() -> str:
    """The table of docs/methods.md, in the order of tests/features.py: the docstring's "Choose it" and "It costs"."""
    lines = ["| method | choose it | parameters | cost | merges |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row.method for row in features.ROWS.values()):
        cells = [
            f"`{method.__name__}`",
            _sentence(method, "Choose it", r"(?:[:;.] |\.$)"),
            method.parameter_count,
            _sentence(method, "(?:It costs|They cost)", r"(?:[:.] |\.$)"),
            _merges(method),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def starting_settings(method: type[lp.PEFTMethod]) -> str:
    """A section of recipes/methods.yaml to start from: LoRA's learning rate, and the method's default arguments."""
    first = re.sub(r" \([^()]*\)\.$", ".", (inspect.getdoc(method) or "").partition("\n")[0])
    lines = [f"# {method.__name__}: {first}", "model:", "  init_args:"]
    lines.append("    lr: 2.0e-3                          # peak learning rate")
    lines.append(f"method: {method.__name__}")
    return "\n".join([f"\n--- # {command_name(method)}", *lines, ""])


def settings() -> str:
    """The sections of docs/method_settings.md, from recipes/methods.yaml."""
    titles = {command_name(method): f"`{method.__name__}`" for method in exported()}
    return "\n\n".join(
        f"## {titles.get(name, name)}\n\n```yaml\n{section.text}```" for name, section in read_settings().items()
    )


_FAMILIES = {
    "Weight methods": lp.WeightMethod,
    "Activation methods": lp.ActivationMethod,
    "Prefixes and prompts": lp.PEFTMethod,
    "Selection methods": lp.SelectionMethod,
}


def _by_family() -> dict[str, list[type[lp.PEFTMethod]]]:
    """The exported methods by the title of their family; "Prefixes and prompts" takes those of no other family."""
    found: dict[str, list[type[lp.PEFTMethod]]] = {title: [] for title in _FAMILIES}
    for method in sorted(exported(), key=lambda method: method.__name__.lower()):
        fits = [title for title, family in _FAMILIES.items() if issubclass(method, family)]
        found[next((title for title in fits if _FAMILIES[title] is not lp.PEFTMethod), fits[0])].append(method)
    return found


def _methods() -> list[type[lp.PEFTMethod]]:
    return [method for members in _by_family().values() for method in members]


def _rows() -> Iterator[tuple[type[lp.PEFTMethod], str, Row]]:
    """The rows of tests/table.py with the class of each, without those of test methods."""
    made = {name: type(row.make(KINDS["llama"])) for name, row in METHODS.items()}
    for method in _methods():
        yield from ((method, name, METHODS[name]) for name, made_by in made.items() if made_by is method)


def _adapters(name: str, row: Row) -> list[tuple[nn.Module, Adapter]]:
    """The adapters of a row, each with its module, on the first kind of model that the row supports."""
    kind = next(kind for kind in ("vit", "llama") if (name, kind) not in REFUSED)
    model = KINDS[kind].build()
    lp.apply(model, row.make(KINDS[kind]))
    return [(host, a) for _, host in hosts(model) for a in host.adapters.values() if not a.is_passthrough]


def exact_sums() -> str:
    """The methods whose weighted sums are exact, because each adapter has low-rank factors."""
    exact = {}
    for method, name, row in _rows():
        if row.mergeable and not row.selects:
            parts = [part for _, adapter in _adapters(name, row) for part in adapter.weights().values()]
            exact[method.__name__] = exact.get(method.__name__, True) and all(p.low_rank() is not None for p in parts)
    return ", ".join(f"`{name}`" for name, every in exact.items() if every)


_SERVED = {
    "all rows together: the factors are stacked (ranks padded), and two batched products are added to each layer. "
    "Without gradients the factors are stacked once per `with`": lambda how: how is BatchedLowRank,
    "the layer runs once on the whole batch, then each adapter runs on its rows": lambda how: how is PerGroupOutput,
    "all rows together: keys or virtual tokens are padded to the longest and masked; outputs keep the "
    "original lengths": callable,
    "the module that contains all blocks (the encoder) runs once per group of rows": lambda how: how == "spans",
    "the adapted layer runs once per group of rows with the same adapters": lambda how: how is None,
}


def served_rows() -> str:
    """The table of docs/rows.md: how a mixed batch is served, from each adapter's ``batched_class``."""
    found: dict[str, dict[str, None]] = {how: {} for how in _SERVED}
    for method, name, row in _rows():
        for host, adapter in [(None, None)] if row.selects else _adapters(name, row):
            cls = adapter.batched_class(host) if adapter is not None and host is not None else None
            how = "spans" if cls is None and adapter is not None and adapter.spans_hosts else cls
            found[next(text for text, fits in _SERVED.items() if fits(how))][f"`{method.__name__}`"] = None
    return "\n".join(
        ["| adapters | how rows are computed |", "|---|---|"]
        + [f"| {', '.join(names)} | {text} |" for text, names in found.items()]
    )


def reference() -> str:
    """The methods of docs/api.md, by family."""
    return "\n\n".join(
        "\n".join([f"## {title}", "", *(f"::: lightning_peft.{method.__name__}" for method in members)])
        for title, members in _by_family().items()
    )


def logged_values() -> str:
    """The table of docs/logging.md, from the names in lightning_peft/trainer/logs/keys.py."""
    rows = [f"| `{key.name}` | {key.unit} | {key.meaning} | {key.part and f'`{key.part}`'} |" for key in keys.METRICS]
    return "\n".join(["| name | unit | meaning | part |", "|---|---|---|---|", *rows])


LISTS = {
    "api.md": {"methods": reference},
    "logging.md": {"logged values": logged_values},
    "many.md": {"exact sums": exact_sums},
    "method_settings.md": {"settings": settings},
    "methods.md": {"methods": choice},
    "quantised.md": {"methods on quantised bases": packed_methods.table},
    "rows.md": {"served rows": served_rows},
    "strategies.md": {"strategies and precisions": strategies.table},
}


def pages() -> Iterator[tuple[Path, str]]:
    """Map every file with a list to the content that it should have."""
    yield EXPORTS, exports()
    yield DOCS / "support.md", features.page()
    for page, lists in LISTS.items():
        text = (DOCS / page).read_text()
        for name, make in lists.items():
            begin, end = f"<!-- list: {name} -->\n", "<!-- end -->"
            before, found, rest = text.partition(begin)
            assert found, f"docs/{page} has no place for the list {name!r}: {begin}"
            text = f"{before}{begin}\n{make()}\n\n{end}{rest.partition(end)[2]}"
        yield DOCS / page, text


if __name__ == "__main__":
    if EXPORTS.read_text() != (text := exports()):
        EXPORTS.write_text(text)
        # the exports of the package have changed, so start again
        os.execv(sys.executable, [sys.executable, "-m", "tests.lists"])
    for method in defined():
        if command_name(method) not in read_settings():
            SETTINGS.write_text(SETTINGS.read_text() + starting_settings(method))
    for path, text in list(pages()):  # compute every file before the first one is written
        path.write_text(text)
