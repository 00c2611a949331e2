"""Every method of the package is in every list of methods; what is missing is named with its file and what to add.

``tests/lists.py`` generates the lists in the documentation from the classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import lightning_peft as lp
from benchmarks import methods as benchmarks
from lightning_peft.cli.main import main
from lightning_peft.formats.registry import CONVERTERS
from lightning_peft_command import recipes, settings
from tests import features, lists, table
from tests.kinds import KINDS

ROOT = Path(__file__).parents[1]


def _read(path: str) -> str:
    return (ROOT / path).read_text()


def _in_table() -> set[str]:
    return {type(row.make(KINDS["llama"])).__name__ for row in table.METHODS.values()}


def _in_benchmarks() -> set[str]:
    source = _read("benchmarks/methods.py")
    return {*re.findall(r"\blp\.(\w+)\(", source), *benchmarks.METHODS, *benchmarks.NOT_MEASURED}


def _converted() -> set[str]:
    """The methods that PEFT's format supports, and those for which docs/support.md says why it does not."""
    converted = {method.__name__ for converter in CONVERTERS for method in converter.methods}
    return converted | {features.ROWS[row].method.__name__ for row, part in features.HOLES if part == "to PEFT"}


#: file -> the names that it lists, and what to add for one that is missing
LISTS: dict[str, tuple[Callable[[], set[str]], str]] = {
    "lightning_peft/__init__.py": (lambda: set(lp.__all__), "its import and its name: python -m tests.lists"),
    "lightning_peft/formats/registry.py": (
        _converted,
        "a converter in formats/peft/families if PEFT has the method, or why not to HOLES in tests/features.py",
    ),
    "recipes/methods.yaml": (
        lambda: {name for name in lp.__all__ if f": {name}\n" in _read("recipes/methods.yaml")},
        "a section, to start from: python -m tests.lists",
    ),
    "tests/features.py": (lambda: {row.method.__name__ for row in features.ROWS.values()}, "a row in ROWS"),
    "tests/table.py": (_in_table, "a row in METHODS"),
    "benchmarks/methods.py": (_in_benchmarks, "a row in METHODS, or its reason in NOT_MEASURED"),
}


@pytest.mark.parametrize("file", LISTS)
def test_every_method_is_listed(file):
    names, what = LISTS[file]
    missing = sorted({method.__name__ for method in lists.defined()} - names())
    assert not missing, f"{file} lacks {', '.join(missing)}: add {what}"


@pytest.mark.parametrize(("page", "text"), list(lists.pages()), ids=lambda value: getattr(value, "name", ""))
def test_the_lists_are_those_of_the_classes(page, text):
    assert page.read_text() == text, f"{page.relative_to(ROOT)} is out of date: run python -m tests.lists"


@pytest.mark.parametrize("method", lists.defined(), ids=lambda method: method.__name__)
def test_every_method_says_what_trains(method):
    assert "parameter_count" in vars(method), f"{method.__name__} lacks parameter_count, which docs/methods.md shows"


def test_the_settings_to_start_from_are_read_and_run(tmp_path, monkeypatch):
    file = tmp_path / "recipes" / "methods.yaml"
    file.parent.mkdir()
    file.write_text(lists.SETTINGS.read_text().partition("--- #")[0] + lists.starting_settings(lp.HiRA))
    (tmp_path / "recipes" / "quickstart.yaml").write_text((ROOT / "recipes" / "quickstart.yaml").read_text())
    for module in (recipes, settings):
        monkeypatch.setattr(module, "package", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    recipes.recipes(["copy", "quickstart", "hira.yaml", "--method", "HiRA"])
    main(["fit", "--config=hira.yaml", "--trainer.fast_dev_run=1"])


def test_a_method_that_is_not_exported_is_added_in_its_place(tmp_path, monkeypatch):
    text = lists.EXPORTS.read_text()
    less = text.replace("from lightning_peft.methods.hira import HiRA\n", "").replace('    "HiRA",\n', "")
    monkeypatch.setattr(lists, "EXPORTS", tmp_path / "exports.py")
    lists.EXPORTS.write_text(less)
    assert less != text
    assert lists.exports() == text
