"""The included corpus and model are complete, clean, small and pretrained."""

from collections import Counter

import pytest
import torch

from lightning_peft import demo
from lightning_peft.data import LanguageModelData
from lightning_peft.tasks import LanguageModel
from tools.build_demo import OVERLAP, Passage, names_itself, shingles, without_near_duplicates

FOLDER = demo.MODEL.parent


@pytest.fixture(scope="module")
def corpus():
    return {split: demo.load(split) for split in demo.SPLITS}


def test_licence_and_card_are_beside_the_data():
    licence = (FOLDER / "LICENSE-PSF.txt").read_text()
    assert "PSF LICENSE AGREEMENT FOR PYTHON" in licence
    assert "Python Software Foundation; All Rights" in " ".join(licence.split())
    card = (FOLDER / "README.md").read_text()
    assert "LICENSE-PSF.txt" in card
    assert "Changes" in card  # the licence asks for a summary of what was changed


def test_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if "__pycache__" not in path.parts) < 4.2e6


def test_classes_are_balanced_and_match_the_model(corpus):
    from transformers import AutoConfig

    names = list(demo.labels())
    config = AutoConfig.from_pretrained(demo.MODEL)
    assert [config.id2label[number] for number in range(config.num_labels)] == names
    for split, least, most in (("train", 70, 100), ("validation", 35, 40), ("test", 35, 40)):
        counts = Counter(row["label"] for row in corpus[split])
        assert set(counts) == set(names)
        assert least <= min(counts.values()) <= max(counts.values()) <= most


def test_nothing_held_out_is_trained_on(corpus):
    def passages(split):
        return [Passage(row["text"], "", "") for row in corpus[split]]

    held_out = passages("validation") + passages("test")
    assert len({item.text for item in held_out}) == len(held_out)
    for split in ("train", "pretrain"):
        items = passages(split)
        assert without_near_duplicates(items, held_out) == items, f"{split} has near duplicates of held-out text"
    # The check detects a near duplicate: a held-out passage without its last words.
    cut = Passage(" ".join(held_out[0].text.split()[:-6]), "", "")
    assert without_near_duplicates([cut], held_out) == []
    assert 0 < OVERLAP < 0.5
    assert len(shingles(held_out[0].text)) > 5


def test_validation_and_test_share_no_text(corpus):
    test = [Passage(row["text"], "", "") for row in corpus["test"]]
    kept = without_near_duplicates([Passage(row["text"], "", "") for row in corpus["validation"]], test)
    assert len(kept) == len(corpus["validation"])


def test_passages_are_readable_english(corpus):
    for row in corpus["validation"]:
        assert 15 <= len(row["text"].split()) <= 80
        assert not any(mark in row["text"] for mark in (":`", "`_", ".. _"))


def test_no_labelled_passage_names_its_module(corpus):
    for split in ("train", "validation", "test"):
        assert not any(names_itself(Passage(row["text"], row["page"], "")) for row in corpus[split])


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"no split 'valid'; it has pretrain, train, validation, test"):
        demo.load("valid")


@torch.inference_mode()
def test_model_predicts_held_out_tokens_far_better_than_chance():
    data = LanguageModelData("demo", mask=0.3, tokenizer="demo", batch_size=64)
    data.setup()
    batches = [batch for batch, _ in zip(data.val_dataloader(), range(3))]

    def loss(pretrained):
        torch.manual_seed(0)
        model = LanguageModel("demo", pretrained=pretrained).eval().model
        return sum(model(**batch).loss.item() for batch in batches) / len(batches)

    random, trained = loss(False), loss(True)
    assert random == pytest.approx(torch.tensor(4096.0).log().item(), abs=0.3)
    assert trained < random - 4
