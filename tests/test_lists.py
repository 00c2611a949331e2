"""Every method of the package is in every list of methods; what is missing is named with its file and what to add.

The lists in the documentation are made from the classes by ``tests/lists.py``.
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
from tests import features, lists, table
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
    "lightning_peft/formats/registry.py": (
        _converted,
        "a converter in formats/peft/families if PEFT has the method, or why not to HOLES in tests/features.py",
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


@pytest.mark.parametrize(("page", "text"), list(lists.pages()), ids=lambda value: getattr(value, "name", ""))
def test_the_lists_in_the_documentation_are_those_of_the_classes(page, text):
    assert page.read_text() == text, f"docs/{page.name} is out of date: run python -m tests.lists"
