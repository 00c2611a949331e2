"""Every method of the package is in every list of methods; what is missing is named with its file and what to add.

Lists that are generated from the classes (``lightning-peft methods``, docs/support.md, the API reference's signatures)
need no test here. ``tests/test_recipes.py`` holds the recipes, ``tests/docs/test_api.py`` docs/api.md, and
``tests/test_features.py`` what PEFT's converters read and write.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_peft as lp
import lightning_peft.methods
from lightning_peft.formats.registry import CONVERTERS
from tests import features, table
from tests.kinds import KINDS

ROOT = Path(__file__).parents[1]


def _defined() -> list[type[lp.PEFTMethod]]:
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


def _read(path: str) -> str:
    return (ROOT / path).read_text()


def _in_first_column(path: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)", _read(path), re.MULTILINE))


def _in_served_rows() -> set[str]:
    table = _read("docs/rows.md").partition("## What it costs")[2].partition("\n\n## ")[0]
    return set(re.findall(r"`(\w+)`", table))


def _in_table() -> set[str]:
    return {type(row.make(KINDS["llama"])).__name__ for row in table.METHODS.values()}


def _in_benchmarks() -> set[str]:
    source = _read("benchmarks/methods.py")
    return set(re.findall(r"\blp\.(\w+)\(", source)) | set(re.findall(r'^    "(\w+)": "', source, re.MULTILINE))


def _converted() -> set[str]:
    """The methods that PEFT's format has, and those of which docs/support.md says why it has not."""
    converted = {method.__name__ for converter in CONVERTERS for method in converter.methods}
    return converted | {features.ROWS[row].method.__name__ for row, part in features.HOLES if part == "to PEFT"}


#: file -> the names that it lists, and what to add for one that is missing
LISTS: dict[str, tuple[Callable[[], set[str]], str]] = {
    "lightning_peft/__init__.py": (lambda: set(lp.__all__), "its import, and its name in __all__"),
    "docs/methods.md": (lambda: _in_first_column("docs/methods.md"), "a row of the first table"),
    "docs/rows.md": (_in_served_rows, "its name in the table of what it costs"),
    "docs/api.md": (lambda: set(re.findall(r"^::: lightning_peft\.(\w+)$", _read("docs/api.md"), re.M)), "an entry"),
    "docs/support.md": (
        lambda: _in_first_column("docs/support.md"),
        "its row, by `python -m tests.features > docs/support.md`",
    ),
    "lightning_peft/formats/registry.py": (
        _converted,
        "a converter to CONVERTERS if PEFT has the method, or why not to HOLES in tests/features.py",
    ),
    "tests/features.py": (lambda: {row.method.__name__ for row in features.ROWS.values()}, "a row in ROWS"),
    "tests/table.py": (_in_table, "a row in METHODS"),
    "benchmarks/methods.py": (_in_benchmarks, "a row in METHODS, or its reason in NOT_MEASURED"),
}


@pytest.mark.parametrize("file", LISTS)
def test_every_method_is_listed(file):
    names, what = LISTS[file]
    missing = sorted({method.__name__ for method in _defined()} - names())
    assert not missing, f"{file} lacks {', '.join(missing)}: add {what}"


@pytest.mark.parametrize("method", _defined(), ids=lambda method: method.__name__)
def test_every_method_has_a_recipe(method):
    recipes = (path.read_text() for path in (ROOT / "recipes").glob("*.yaml"))
    what = f"class_path lightning_peft.{method.__name__}"
    assert any(f"{what}\n" in recipe.replace("class_path: ", "class_path ") for recipe in recipes), (
        f"recipes/ has no file with {what}: add one, as recipes/lora.yaml"
    )


def test_methods_whose_sums_are_exact_are_listed():
    exact = set()
    for row in table.METHODS.values():
        method = row.make(KINDS["linear"])
        if row.mergeable and not row.selects and type(method) in _defined():
            model = KINDS["linear"].build()
            lp.apply(model, method)
            parts = [part for part in model.modules() if isinstance(part, lp.WeightAdapter)]
            if all(part.low_rank() is not None for part in parts):
                exact.add(type(method).__name__)
    listed = re.search(r"^Sums of low-rank products \(([^)]*)\)", _read("docs/many.md"), re.MULTILINE)
    assert listed is not None
    assert set(listed[1].split(", ")) == exact, "docs/many.md: list exactly these after 'Sums of low-rank products'"
