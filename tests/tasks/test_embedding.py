"""TextEmbedder: pairs come closer, and predict writes one embedding per text."""

from __future__ import annotations

import lightning as L
import torch
from safetensors.torch import load_file

import lightning_peft as lp
from lightning_peft.data import TextPairData
from lightning_peft.tasks import PredictionWriter, TextEmbedder
from tests.data.tables import POLITE, QUIET, RUDE, write


def test_pairs_come_closer_and_embeddings_are_written():
    path = write("pairs.csv", [{"text": a, "text_pair": b} for a, b in zip(POLITE, RUDE)])
    texts = write("texts.csv", [{"text": text} for text in POLITE])
    data = TextPairData(path, path, predict=texts, tokenizer="demo")
    module = TextEmbedder("demo", lr=0.01)
    trainer = L.Trainer(**QUIET, max_epochs=12, callbacks=[lp.LoRA(r=2), PredictionWriter()])
    trainer.validate(module, data, verbose=False)
    before = trainer.callback_metrics["val/loss"]
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/loss"] < before / 2
    assert trainer.callback_metrics["val/acc"] == 1
    predicted = torch.cat(trainer.predict(module, data))
    torch.testing.assert_close(load_file("predictions.safetensors")["embedding"], predicted)
    torch.testing.assert_close(predicted.norm(dim=-1), torch.ones(4))


def test_padding_does_not_change_an_embedding():
    module = TextEmbedder("demo").eval()
    ids = torch.arange(5, 14)[None]
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(module(padded, (padded != 0).long()), module(ids, torch.ones_like(ids)))
