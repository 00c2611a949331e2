"""QuestionAnswering: answers are found in the context, and scored as in SQuAD."""

from __future__ import annotations

import lightning as L
import pytest

import lightning_peft as lp
from lightning_peft.data import QuestionAnsweringData
from lightning_peft.pretrained import InputError
from lightning_peft.tasks import QuestionAnswering
from tests.data.tables import QUIET, write

ROWS = [
    {"question": "what is opened", "context": "please open the file now", "answers": "the file"},
    {"question": "what is sorted", "context": "sort the words of the list", "answers": "the words"},
    {"question": "who is thanked", "context": "there is nobody", "answers": ""},
]


def squad(rows):
    starts = [row["context"].find(row["answers"]) for row in rows]
    texts = [{"text": [r["answers"]], "answer_start": [s]} if r["answers"] else None for r, s in zip(rows, starts)]
    return [{**row, "answers": text or {"text": [], "answer_start": []}} for row, text in zip(rows, texts)]


@pytest.mark.parametrize("form", ["csv", "squad"])
def test_learns_to_answer(form):
    path = write("qa.csv", ROWS) if form == "csv" else write("qa.jsonl", squad(ROWS))
    data = QuestionAnsweringData(path, path, path, tokenizer="demo")
    module = QuestionAnswering("demo", lr=0.02)
    L.seed_everything(0)
    trainer = L.Trainer(**{**QUIET, "check_val_every_n_epoch": 15}, max_epochs=15, callbacks=[lp.LoRA(r=4)])
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/squad_exact_match"] == 100
    assert trainer.callback_metrics["val/squad_f1"] == 100
    answers = [text for batch in trainer.predict(module, data) for text in batch]
    assert [answer.strip() for answer in answers] == [row["answers"] for row in ROWS]


def test_an_answer_that_the_context_lacks():
    path = write("qa.csv", [{**ROWS[0], "answers": "a file"}])
    with pytest.raises(InputError, match=r"row 0 of '.*': the answer 'a file' is not in the context"):
        QuestionAnsweringData(path, tokenizer="demo").setup("fit")
