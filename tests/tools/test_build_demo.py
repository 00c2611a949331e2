"""The corpus builder, on three small pages."""

import json
import random

import pytest

from tools import build_demo as build

PAGES = {"colours": "library/paint", "sounds": "library/horn"}


@pytest.fixture
def docs(tmp_path):
    """A library reference of two chapters of one module each, and a third too small to be a class."""
    library = tmp_path / "docs" / "library"
    library.mkdir(parents=True)
    chapters = {"colours": "paint", "sounds": "horn", "tiny": "speck"}
    tree = "Library\n=======\n\n.. toctree::\n   :maxdepth: 2\n\n"
    (library / "index.rst").write_text(tree + "".join(f"   {name}.rst\n" for name in chapters))
    for chapter, module in chapters.items():
        (library / f"{chapter}.rst").write_text(f"{chapter.title()}\n=======\n\n.. toctree::\n\n   {module}.rst\n")
        rng = random.Random(chapter)
        count = 4 if chapter == "tiny" else 100
        sections = [f"Section {i}\n----------\n\n{_prose(rng)}\n\n{_prose(rng)}" for i in range(count)]
        (library / f"{module}.rst").write_text("\n\n".join(sections) + f"\n\nThe {module} module.\n")
    return tmp_path / "docs"


def _prose(rng):
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(30)) + "."


def test_same_sources_give_the_same_bytes(docs, tmp_path):
    counts = [build.build(docs, tmp_path / out) for out in ("one", "two")]
    assert counts[0] == counts[1]
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"labels.json", "train.jsonl.xz", "tokenizer.json", "config.json"}
    for path in files:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path.name


def test_classes_are_the_chapters_with_enough_text_and_sections_are_not_divided(docs, tmp_path):
    build.build(docs, tmp_path)
    labels = json.loads((tmp_path / "corpus" / "labels.json").read_text())
    assert labels == {"colours": "Colours", "sounds": "Sounds"}
    texts = {chapter: build.passages(build.read(docs, page), page) for chapter, page in PAGES.items()}
    splits = build.labelled_splits(texts)
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 80, "validation": 80, "train": 200}
    sections = {name: {(p.page, p.section) for _, p in rows} for name, rows in splits.items()}
    assert not sections["test"] & sections["validation"]
    assert not sections["train"] & (sections["test"] | sections["validation"])


def test_chapters_follow_toctrees_at_any_depth(docs):
    (docs / "library" / "paint.rst").write_text("Paint\n=====\n\n.. toctree::\n\n   brush.rst\n")
    (docs / "library" / "brush.rst").write_text("Brush\n=====\n")
    assert build.chapters(docs)["colours"] == ["library/paint", "library/brush"]


def test_passages_that_name_their_module_are_detected():
    def named(text, page="library/concurrent.futures"):
        return build.names_itself(build.Passage(text, page, ""))

    assert named("The Futures are resolved.")
    assert named("A GzipFile is closed.", "library/gzip")
    assert not named("The future is bright.")
    assert named("Call re to match.", "library/re")
    assert not named("Read the reply.", "library/re")


def test_near_duplicates_are_found_whatever_their_punctuation():
    text = "The buffer is flushed when it is full or when the stream is closed by its owner."
    held_out = [build.Passage(text, "a", "")]
    same = build.Passage(text.upper().replace(" ", ", ") + " Now.", "b", "")
    other = build.Passage("Locks are released in the order in which their waiters arrived.", "b", "")
    assert build.without_near_duplicates([same, other], held_out) == [other]


def test_long_sentences_are_cut_and_short_leftovers_dropped():
    source = "Title\n=====\n\n" + "word " * 200 + "\n\nOther\n-----\n\nToo short.\n"
    (only,) = build.passages(source, "page")
    assert len(only.text.split()) == build.WORDS[1]


def test_wrong_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Doc folder of a CPython checkout"):
        build.build(tmp_path, tmp_path / "out")
