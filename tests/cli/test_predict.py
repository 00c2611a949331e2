"""``lightning-peft predict``: its output file for every kind of task, without a label column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from console import run
from safetensors.torch import load_file

from tests.data.tables import POLITE, RUDE, read, requests, write

TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "default_root_dir": ".",
    "max_epochs": 1,
    "callbacks": [{"class_path": "lightning_peft.LoRA", "init_args": {"r": 2}}],
}


def fitted(model: dict, data: dict, model_class: str, data_class: str, **trainer) -> list[str]:
    """Fit a task from YAML; return the arguments that name the run's configuration and its checkpoint."""
    config = {
        "model": {"class_path": f"lightning_peft.tasks.{model_class}", "init_args": model},
        "data": {"class_path": f"lightning_peft.data.{data_class}", "init_args": data},
        "trainer": {**TRAINER, **trainer},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    run("fit", "--config=run.yaml")
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    return ["--config=config.yaml", f"--ckpt_path={checkpoint}"]


def test_classes_are_named_after_the_columns_of_the_input_and_no_label_is_needed():
    data = {"source": requests(), "tokenizer": "demo", "batch_size": 3, "validation_fraction": 0.25}
    files = fitted({"model": "demo", "lr": 0.02}, data, "TextClassifier", "TextClassificationData", max_epochs=15)
    new = write("new.csv", [{"id": i, "text": text} for i, text in enumerate([*POLITE, *RUDE])])
    Path("requests.csv").unlink()  # the checkpoint has the labels
    said = run("predict", *files, f"--data.predict={new}")
    assert said.splitlines()[-1] == "8 predictions: predictions.csv"
    rows = read("predictions.csv")
    assert list(rows[0]) == ["id", "text", "label", "probability"]
    assert [row["id"] for row in rows] == [*map(str, range(8))]
    assert sum(row["label"] == ("polite" if i < 4 else "rude") for i, row in enumerate(rows)) >= 6
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    run("predict", *files, f"--data.predict={new}", "--output=out/answers.jsonl")
    lines = [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["label"] for row in rows]


def test_generated_texts_and_an_adapter_for_each_row(gpt2):
    rows = [{"prompt": text, "target": "yes", "who": "a" if i % 2 else ""} for i, text in enumerate(POLITE)]
    path = write("chat.csv", rows)
    lora = {"class_path": "lightning_peft.LoRA", "init_args": {"r": 2, "name": "a"}}
    model = {"model": gpt2, "max_new_tokens": 4, "lr": 0.5}
    files = fitted(model, {"source": path, "test": path}, "LanguageModel", "GenerationData", callbacks=[lora])
    run("predict", *files)
    always = read("predictions.csv")
    assert list(always[0]) == ["prompt", "target", "who", "prediction"]
    run("predict", *files, "--adapter_column=who")
    chosen = read("predictions.csv")
    differs = [a["prediction"] != b["prediction"] for a, b in zip(always, chosen)]
    assert not any(differs[1::2])
    assert any(differs[::2])


def test_numbers_and_a_file_that_already_has_a_column_of_that_name():
    rows = [{"text": text, "label": len(text) / 10} for text in [*POLITE, *RUDE]]
    path = write("lengths.csv", rows)
    files = fitted({"model": "demo"}, {"source": path, "test": path}, "TextRegressor", "TextRegressionData")
    run("predict", *files)
    assert list(read("predictions.csv")[0]) == ["text", "label", "prediction"]
    run("predict", *files, "--output=numbers.safetensors")
    assert load_file("numbers.safetensors")["prediction"].shape == (8,)


def test_other_modules_and_endings(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    Path("answers.py").write_text(
        "from modules import Data, Module\n"
        "class Mine(Module):\n    predict_step = lambda self, batch, batch_idx: self(batch[0])\n"
        "class Silent(Module):\n    predict_step = lambda self, batch, batch_idx: None\n"
        "class Rows(Data):\n    predict_dataloader = Data.val_dataloader\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    flags = ["--data=answers.Rows", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    run("predict", "--model=answers.Mine", *flags)
    assert torch.tensor(json.loads(read("predictions.csv")[0]["prediction"])).shape == (2,)
    assert "no file was written" in run("predict", "--model=answers.Silent", *flags, "--output=none.csv")
    assert not Path("none.csv").exists()
    with pytest.raises(SystemExit, match=r"error: output='x\.xls': the file's name must end in one of"):
        run("predict", "--model=answers.Mine", *flags, "--output=x.xls")
    with pytest.raises(SystemExit, match="adapter_column needs a DataModule"):
        run("predict", "--model=answers.Mine", *flags, "--adapter_column=who")


def test_another_optimizer_and_schedule_from_yaml():
    config = {
        "model": {"class_path": "lightning_peft.tasks.TextClassifier", "init_args": {"model": "demo"}},
        "data": {"class_path": "lightning_peft.data.TextClassificationData", "init_args": {"source": requests()}},
        "trainer": TRAINER,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.1}},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    run("fit", "--config=run.yaml")
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]] == pytest.approx([0.05])
    assert saved["lr_schedulers"][0]["gamma"] == 0.1
