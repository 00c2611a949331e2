"""TokenClassifier: a label for each word, from lists and from texts."""

from __future__ import annotations

import lightning as L
import pytest

import lightning_peft as lp
from lightning_peft.data import TokenClassificationData
from lightning_peft.tasks import TokenClassifier
from tests.data.tables import QUIET, write

WORDS = [["open", "the", "FileHandle", "now"], ["sort", "Dictionary"], ["list", "of", "Sockets"]]
TAGS = [["O", "O", "THING", "O"], ["O", "THING"], ["O", "O", "THING"]]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_words_get_the_label_of_their_first_token(suffix):
    join = " ".join if suffix == "csv" else list
    path = write(f"slots.{suffix}", [{"tokens": join(w), "tags": join(t)} for w, t in zip(WORDS, TAGS)])
    data = TokenClassificationData(path, path, path, batch_size=2)
    module = TokenClassifier("demo", lr=0.02)
    L.seed_everything(0)
    trainer = L.Trainer(**QUIET, max_epochs=40, callbacks=[lp.LoRA(r=2)])
    trainer.fit(module, data)
    assert data.labels == ["O", "THING"]
    for example, words, tags in zip(data.prepared("train"), WORDS, TAGS):
        kept = [(i, n) for i, n in zip(example["input_ids"], example["labels"]) if n != -100]
        assert [data.labels[n] for _, n in kept] == tags
        first = [data.tokenizer.decode(i).strip() for i, _ in kept]
        assert all(word.lower().startswith(token.lower()) for word, token in zip(words, first))
    assert len(data.prepared("train")[0]["input_ids"]) > len(WORDS[0]) + 2, "a word has several tokens"
    assert trainer.callback_metrics["val/acc"] == 1
    predicted = [tags for batch in trainer.predict(module, data) for tags in batch]
    assert predicted == TAGS


def test_words_that_are_cut_get_none():
    path = write("slots.jsonl", [{"tokens": w, "tags": t} for w, t in zip(WORDS, TAGS)])
    data = TokenClassificationData(path, predict=path, max_length=4)
    predicted = L.Trainer(**QUIET).predict(TokenClassifier("demo", labels=["O", "THING"]), data)[0]
    assert [len(tags) for tags in predicted] == [4, 2, 3]
    assert predicted[0][-1] is None
