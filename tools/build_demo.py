"""Build the demo corpus, tokenizer and model configuration from the sources of Python's documentation.

    python -m tools.build_demo --docs cpython/Doc

``--docs`` is the ``Doc`` folder of a CPython checkout, or the ``_sources`` folder of the built documentation. The same
sources give the same bytes. ``lightning_peft/demo/README.md`` describes the result, and why the task is fair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_peft import demo
from tools.rst import paragraphs, title

WORDS = (25, 80)  # a passage is complete at the first number of words, and never longer than the second
MIN_PASSAGE = 18  # passages with fewer words are dropped
MIN_CHAPTER = 180  # a chapter with fewer usable passages is not a class, because it is too small to split three ways
PER_CLASS = {"test": 40, "validation": 40, "train": 100}
NOT_A_SUBJECT = {"superseded"}  # this chapter has deprecated modules of every subject
PRETRAINING = ("library", "tutorial", "reference", "howto", "faq", "using", "extending", "c-api", "whatsnew")
NOT_PROSE = {"changelog"}  # the changelog: a megabyte of single lines, unlike other documentation
SHINGLE, OVERLAP = 5, 0.25  # near duplicates share at least this fraction of the shorter passage's five-word sequences


VOCABULARY, MAX_LENGTH = 4096, 128  # size of the tokenizer's vocabulary
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


@dataclass(frozen=True)
class Passage:
    """A passage of the documentation.

    Attributes:
        text: Plain English, ``WORDS`` long.
        page: The page it is from, as a path without suffix (``library/gzip``).
        section: The section of that page; passages of one section are never split over train and test.
    """

    text: str
    page: str
    section: str


def read(docs: Path, page: str) -> str:
    """The reST source of a page, whether from a checkout (``.rst``) or a built tree (``.rst.txt``)."""
    for suffix in (".rst", ".rst.txt"):
        if (path := docs / (page + suffix)).is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"no page {page!r} in {docs}: --docs takes the Doc folder of a CPython checkout "
        "(with library/index.rst), or the _sources folder of the built documentation (library/index.rst.txt)."
    )


def toctree(source: str) -> list[str]:
    """The pages that a page's ``toctree`` directives list, in order, without suffix."""
    bodies = re.findall(r"^\.\. toctree::\n((?:[ \t]+\S.*\n|[ \t]*\n)*)", source + "\n", re.MULTILINE)
    entries = (line.strip() for body in bodies for line in body.splitlines())
    return [entry.removesuffix(".rst") for entry in entries if entry and not entry.startswith(":")]


def chapters(docs: Path) -> dict[str, list[str]]:
    """The library reference's chapters: name -> the pages under it, at any depth."""

    def under(page: str) -> Iterator[str]:
        for name in toctree(read(docs, f"library/{page}")):
            yield f"library/{name}"
            yield from under(name)

    return {chapter: list(under(chapter)) for chapter in toctree(read(docs, "library/index"))}


def passages(source: str, page: str) -> list[Passage]:
    """Join a section's paragraphs into passages of ``WORDS`` words; cut long ones at sentences."""
    found: list[Passage] = []
    words: list[str] = []
    where = ""

    def close() -> None:
        if len(words) >= MIN_PASSAGE and _reads_as_english(words):
            found.append(Passage(" ".join(words), page, where))
        words.clear()

    for section, paragraph in paragraphs(source):
        if section != where:
            close()
            where = section
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph if paragraph[-1] in ".!?" else paragraph + "."):
            if len(words) + len(sentence.split()) > WORDS[1]:
                close()
            words += sentence.split()[: WORDS[1]]
        if len(words) >= WORDS[0]:
            close()
    close()
    return found


def _reads_as_english(words: list[str]) -> bool:
    return sum(word.strip(".,;:()'\"").isalpha() for word in words) >= 0.7 * len(words)


def names_itself(passage: Passage) -> bool:
    """Whether a passage contains the name of its own module, alone or inside an identifier (``GzipFile`` in
    ``gzip``)."""
    words = re.findall(r"[a-z0-9_]+", passage.text.lower())
    for part in re.split(r"[.\-]", passage.page.split("/")[-1].lower()):
        if any(part == word or (len(part) > 3 and part in word) for word in words):
            return True
    return False


def shingles(text: str) -> set[tuple[str, ...]]:
    """Every sequence of ``SHINGLE`` words, in lower case, with letters and digits only."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def without_near_duplicates(items: Iterable[Passage], held_out: Iterable[Passage]) -> list[Passage]:
    """The items that share less than the fraction ``OVERLAP`` of their word sequences with every held-out passage."""
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    for number, other in enumerate(held_out):
        runs = shingles(other.text)
        sizes.append(len(runs))
        for run in runs:
            index[run].append(number)
    kept = []
    for item in items:
        runs = shingles(item.text)
        shared = Counter(number for run in runs for number in index.get(run, ()))
        if all(count < OVERLAP * min(len(runs), sizes[number]) for number, count in shared.items()):
            kept.append(item)
    return kept


def _order(*parts: str) -> str:
    """A sort key that gives a random order, the same on every machine."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def labelled_splits(by_label: dict[str, list[Passage]]) -> dict[str, list[tuple[str, Passage]]]:
    """Assign whole sections of each class to test, then to validation; draw train from the remaining ones.

    Returns:
        Split name -> ``(label, passage)`` pairs in a fixed random order.
    """
    splits: dict[str, list[tuple[str, Passage]]] = {name: [] for name in PER_CLASS}
    for label, items in by_label.items():
        sections: dict[tuple[str, str], list[Passage]] = defaultdict(list)
        for item in sorted(items, key=lambda item: _order(item.text)):
            sections[item.page, item.section].append(item)
        queue = sorted(sections, key=lambda key: _order(*key))
        for split in ("test", "validation"):
            room = PER_CLASS[split]
            while queue and room > 0:
                chosen = sections.pop(queue.pop(0))[:room]
                splits[split] += [(label, item) for item in chosen]
                room -= len(chosen)
        rest = sorted((item for left in sections.values() for item in left), key=lambda item: _order(item.text))
        splits["train"] += [(label, item) for item in rest[: PER_CLASS["train"]]]
    return {name: sorted(rows, key=lambda row: _order(row[1].text)) for name, rows in splits.items()}


def build(docs: Path, out: Path) -> dict[str, int]:
    """Write ``corpus/`` (four splits and ``labels.json``) and ``model/`` (everything except the weights) into ``out``.

    Returns:
        How many passages each file has.

    Raises:
        FileNotFoundError: if ``docs`` is not the source of Python's documentation.
    """
    by_label: dict[str, list[Passage]] = {}
    labels: dict[str, str] = {}
    for chapter, pages in chapters(docs).items():
        items = [item for page in pages for item in passages(read(docs, page), page) if not names_itself(item)]
        if len(items) >= MIN_CHAPTER and chapter not in NOT_A_SUBJECT:
            by_label[chapter] = items
            labels[chapter] = title(read(docs, f"library/{chapter}"))

    splits = labelled_splits(by_label)
    held_out = [item for split in ("validation", "test") for _, item in splits[split]]
    hidden = {(item.page, item.section) for item in held_out}
    tested = [item for _, item in splits["test"]]
    for split, others in (("train", held_out), ("validation", tested), ("test", [])):
        clean = {item.text: item for item in without_near_duplicates([p for _, p in splits[split]], others)}
        splits[split] = [row for row in splits[split] if clean.get(row[1].text) is row[1]]

    text: dict[str, Passage] = {}
    for page in _pages(docs):
        for item in passages(read(docs, page), page):
            if (item.page, item.section) not in hidden:
                text.setdefault(item.text, item)
    pretrain = without_near_duplicates(text.values(), held_out)

    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        _write(
            corpus / f"{name}.jsonl.xz",
            [{"text": p.text, "label": label, "page": p.page} for label, p in rows],
        )
    _write(corpus / "pretrain.jsonl.xz", [{"text": item.text} for item in pretrain])
    (corpus / "labels.json").write_text(json.dumps(labels, indent=2) + "\n")
    train_tokenizer((item.text for item in pretrain), out / "model")
    configure_model(list(labels), out / "model")
    return {"pretrain": len(pretrain), **{name: len(rows) for name, rows in splits.items()}}


def train_tokenizer(texts: Iterable[str], out: Path) -> None:
    """Train a lower-case byte-level BPE tokenizer, and save it where ``AutoTokenizer`` finds it.

    BERT's own WordPiece is not used, because its trainer gives a different vocabulary in each run.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in special}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, **SPECIAL}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _pages(docs: Path) -> list[str]:
    paths = (path for part in PRETRAINING for path in (docs / part).rglob("*.rst*"))
    names = {path.relative_to(docs).as_posix().split(".rst")[0] for path in paths}
    return sorted(name for name in names if name.split("/")[-1] not in NOT_PROSE)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def configure_model(labels: Iterable[str], out: Path) -> None:
    """Write the configuration of the network that ``recipes/demo_pretrain.yaml`` trains."""
    from transformers import ModernBertConfig

    ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=0,
        cls_token_id=2,
        bos_token_id=2,
        sep_token_id=3,
        eos_token_id=3,
        classifier_pooling="mean",  # pretraining does not train [CLS], so the mean over tokens is the better start
        sparse_prediction=True,  # compute logits only for masked tokens, which halves the time
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        architectures=["ModernBertForMaskedLM"],
    ).save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="Doc folder of a CPython checkout")
    parser.add_argument("--out", type=Path, default=demo.CORPUS.parent, help="default: the package's demo folder")
    args = parser.parse_args()
    for name, count in build(args.docs, args.out).items():
        print(f"{name}: {count} passages")


if __name__ == "__main__":
    main()
