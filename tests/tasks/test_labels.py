"""Labels come from the data, and go into the checkpoint, the configuration and the merged model; heads train."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

import lightning_peft as lp
from lightning_peft import demo
from lightning_peft.cli.main import main
from lightning_peft.data import TextClassificationData, TextRegressionData
from lightning_peft.pretrained import InputError
from lightning_peft.tasks import TextClassifier, TextRegressor
from tests.data.tables import POLITE, QUIET, RUDE, read, requests, write


def fit(module, data, **options):
    trainer = L.Trainer(**{**QUIET, "max_epochs": 1, "callbacks": [lp.LoRA(r=2)], **options})
    trainer.fit(module, data)
    return trainer


def test_number_names_and_head_come_from_the_data_and_return_from_the_checkpoint():
    module = TextClassifier("demo")
    head = module.model.classifier.weight
    trainer = fit(module, TextClassificationData(requests(), tokenizer="demo"))
    assert module.labels == ["polite", "rude"]
    assert module.model.classifier.weight.shape[0] == 2
    assert module.model.classifier.weight.requires_grad, "a new head trains although no method names it"
    assert head is not module.model.classifier.weight
    assert module.model.config.id2label == {0: "polite", 1: "rude"}
    trainer.save_checkpoint("run.ckpt")
    again = lp.load_from_checkpoint(TextClassifier, "run.ckpt").eval()
    assert again.labels == ["polite", "rude"]
    ids = torch.arange(5, 17).view(2, 6)
    assert torch.equal(again(ids, torch.ones_like(ids)), module.eval()(ids, torch.ones_like(ids)))


def test_a_merged_model_answers_a_pipeline_with_the_names():
    from transformers import pipeline

    config = {
        "model": {"class_path": "lightning_peft.tasks.TextClassifier", "init_args": {"model": "demo"}},
        "data": {"class_path": "lightning_peft.data.TextClassificationData", "init_args": {"source": requests()}},
        "trainer": {
            **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
            "accelerator": "cpu",
            "max_epochs": 1,
            "callbacks": [{"class_path": "lightning_peft.LoRA"}],
        },
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=run.yaml"])
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    main(["merge", str(checkpoint), "out"])
    new = write("new.csv", [{"text": text} for text in POLITE])
    main(["predict", "--config=config.yaml", f"--ckpt_path={checkpoint}", f"--data.predict={new}"])
    classify = pipeline("text-classification", "out", device="cpu")
    for row, said in zip(read("predictions.csv"), classify(POLITE)):
        assert said["label"] == row["label"]
        assert said["score"] == pytest.approx(float(row["probability"]), abs=1e-4)


def test_labels_that_the_user_gives_are_kept():
    data = TextClassificationData(requests(), tokenizer="demo")
    module = TextClassifier("demo", labels=["rude", "polite"])
    fit(module, data)
    assert data.labels == ["rude", "polite"]
    assert module.labels == ["rude", "polite"]
    with pytest.raises(InputError, match="num_labels=3, but labels names 2"):
        TextClassifier("demo", num_labels=3, labels=["a", "b"])
    adapted = TextClassifier("demo")
    lp.apply(adapted, lp.LoRA(r=2))
    with pytest.raises(
        InputError, match=r"the data has 2 \(polite, rude\), but .* 17 outputs already: pass num_labels=2"
    ):
        fit(adapted, TextClassificationData(requests(), tokenizer="demo"))


@pytest.mark.parametrize("separator", ["|", None])
def test_several_labels_per_text(separator):
    words = [["open"], ["list", "thanks"], ["sort", "list"], [], ["open"], ["list"]]
    rows = [{"text": text, "label": "|".join(w) if separator else w} for text, w in zip([*POLITE, *RUDE], words)]
    path = write("rows.csv" if separator else "rows.jsonl", rows)
    data = TextClassificationData(path, path, path, label_separator=separator, tokenizer="demo")
    module = TextClassifier("demo", lr=0.03)
    trainer = fit(module, data, max_epochs=20)
    assert module.labels == ["list", "open", "sort", "thanks"]
    assert module.multi_label
    assert trainer.callback_metrics["val/acc"] > 0.9
    (probabilities,) = trainer.predict(module, data)
    found = module.prediction_columns(probabilities, {})["label"]
    assert sum(found[i] == "|".join(sorted(w)) for i, w in enumerate(words)) >= 4
    assert module.model.config.problem_type == "multi_label_classification"


def test_pairs_with_a_number():
    rows = [{"one": a, "two": b, "score": len(a) - len(b)} for a, b in zip(POLITE, RUDE)]
    scores = torch.tensor([float(row["score"]) for row in rows])
    path = write("pairs.csv", rows)
    options = {"text": "one", "text_pair": "two", "label": "score", "tokenizer": "demo"}
    data = TextRegressionData(path, path, path, **options)
    module = TextRegressor("demo", lr=0.01)
    trainer = fit(module, data, max_epochs=5)
    (numbers,) = trainer.predict(module, data)
    logged = trainer.validate(module, data, verbose=False)[0]["val/pearson"]
    assert logged == pytest.approx(torch.corrcoef(torch.stack([numbers, scores]))[0, 1].item(), abs=1e-4)
    tokens = data.tokenizer.decode(data.prepared("train")[0]["input_ids"])
    assert tokens.count("[SEP]") == 2
    assert "open it now" in tokens


def test_an_adapter_contains_the_names_of_its_labels():
    from transformers import AutoModelForSequenceClassification

    module = TextClassifier("demo")
    trainer = fit(module, TextClassificationData(requests(), tokenizer="demo"))
    trainer.save_checkpoint("run.ckpt")
    lp.save_adapter(module, "adapter")
    main(["export", "run.ckpt", "exported"])
    for folder in ("adapter", "exported"):
        plain = AutoModelForSequenceClassification.from_pretrained(
            demo.MODEL, id2label={0: "LABEL_0", 1: "LABEL_1"}, ignore_mismatched_sizes=True
        )
        lp.load_adapter(plain, folder)
        assert plain.config.id2label == {0: "polite", 1: "rude"}
        assert plain.config.num_labels == 2
        named = AutoModelForSequenceClassification.from_pretrained(
            demo.MODEL, id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True
        )
        lp.load_adapter(named, folder)
        assert named.config.id2label == {0: "a", 1: "b"}, "a model's own names are kept"
