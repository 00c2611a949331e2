"""The order and the cache of examples: groups by length, resume inside an epoch, tokenizing once."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import lightning_peft as lp
from lightning_peft.data import TextClassificationData
from lightning_peft.tasks import TextClassifier
from tests.data.tables import QUIET, requests, write


def data(**options) -> TextClassificationData:
    return TextClassificationData(requests(), tokenizer="demo", batch_size=2, **options)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_run_that_stops_in_an_epoch_goes_on_with_the_same_batches(grouped):
    def fit(steps: int, path: str | None = None) -> dict[str, torch.Tensor]:
        L.seed_everything(3)
        module = TextClassifier("demo", warmup=0.0)
        trainer = L.Trainer(**QUIET, max_steps=steps, callbacks=[lp.LoRA(r=2)])
        module.configure_optimizers = lambda: torch.optim.SGD(lp.trainable_parameters(module), lr=0.1)
        trainer.fit(module, data(group_by_length=grouped), ckpt_path=path)
        trainer.save_checkpoint("run.ckpt")
        return lp.adapter_state(module)

    whole = fit(7)
    fit(2)
    resumed = fit(7, "run.ckpt")
    assert all(torch.equal(whole[key], value) for key, value in resumed.items())


def test_groups_of_similar_length():
    texts = ["word " * (1 + i % 10) for i in range(200)]
    path = write("lengths.csv", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    padding = []
    for grouped in (False, True):
        L.seed_everything(0)
        loaded = TextClassificationData(path, tokenizer="demo", batch_size=4, group_by_length=grouped)
        loaded.setup("fit")
        batches = list(loaded.train_dataloader())
        assert sum(len(batch["labels"]) for batch in batches) == 200
        padding.append(sum(int((batch["attention_mask"] == 0).sum()) for batch in batches))
    assert padding[1] < padding[0] / 3


def test_rows_are_tokenized_once(monkeypatch):
    first = data()
    first.setup("fit")
    monkeypatch.setattr(TextClassificationData, "tokenize", lambda *_, **__: pytest.fail("tokenized again"))
    again = TextClassificationData("requests.csv", tokenizer="demo", batch_size=2)
    again.setup("fit")
    assert again.prepared("train")[:] == first.prepared("train")[:]
    changed = TextClassificationData("requests.csv", tokenizer="demo", max_length=8)
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        changed.setup("fit")


def test_a_fraction_is_set_aside_for_validation_and_always_the_same():
    split = data(validation_fraction=0.25)
    split.setup("fit")
    assert [len(split.table(name)) for name in ("train", "validation")] == [6, 2]
    L.seed_everything(99)
    again = data(validation_fraction=0.25)
    again.setup("fit")
    assert again.table("validation")[:] == split.table("validation")[:]
    assert not {*again.table("train")["text"]} & {*again.table("validation")["text"]}
