"""SequenceToSequence: T5 and BART learn, write texts, and are scored by them."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import lightning_peft as lp
from lightning_peft import demo
from lightning_peft.data import GenerationData, SequenceToSequenceData
from lightning_peft.pretrained import InputError
from lightning_peft.tasks import LanguageModel, SequenceToSequence
from tests.data.tables import POLITE, QUIET, RUDE, write


def folder(kind: str) -> str:
    from transformers import (
        AutoTokenizer,
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL, eos_token="[SEP]")
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": 3, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=4096, **sizes, **special))
    else:
        parts = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=4096, **parts, **widths, **special, bos_token_id=2, forced_eos_token_id=3)
        )
    model.save_pretrained(kind)
    tokenizer.save_pretrained(kind)
    return kind


def table() -> str:
    return write("pairs.csv", [{"prompt": prompt, "target": target} for prompt, target in zip(RUDE, POLITE)])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_learns_writes_and_is_scored(kind):
    module = SequenceToSequence(
        folder(kind), lr=0.01, max_new_tokens=8, samples=1, metrics=["rougeL", "bleu", "exact_match"]
    )
    data = SequenceToSequenceData(table(), table(), table(), batch_size=2)
    stop = L.pytorch.callbacks.ModelCheckpoint(monitor="val/rougeL", mode="max")
    options = {**QUIET, "enable_checkpointing": True, "limit_val_batches": 1, "check_val_every_n_epoch": 20}
    trainer = L.Trainer(**options, max_epochs=20, callbacks=[lp.FullFineTuning(), stop])
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"] < 5
    assert {"val/rougeL", "val/bleu", "val/exact_match", "val/loss"} <= trainer.callback_metrics.keys()
    texts = [text for batch in trainer.predict(module, data) for text in batch]
    assert texts == module.generate(RUDE, 8)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        wanted = module.eval().model(**batch).loss
    logged = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    assert logged == pytest.approx(wanted.item(), rel=1e-4)


def test_the_other_kind_of_model_and_data_are_named():
    with pytest.raises(InputError, match="'t5' has an encoder and a decoder: use the task SequenceToSequence"):
        LanguageModel(folder("t5"))
    with pytest.raises(InputError, match="GenerationData is for models whose objective is 'causal'"):
        L.Trainer(max_steps=1, **QUIET).fit(SequenceToSequence("t5"), GenerationData(table()))
