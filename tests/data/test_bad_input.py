"""Bad input is refused before training, in one line that names the column, the row or the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file

import lightning_peft as lp
from lightning_peft import demo
from lightning_peft.data import TextClassificationData, TextRegressionData, TokenClassificationData
from lightning_peft.pretrained import InputError, load_tokenizer
from lightning_peft.tasks import LanguageModel, TextClassifier, TextRegressor
from tests.data.tables import QUIET, requests, write


def text(source: str, **options) -> TextClassificationData:
    return TextClassificationData(source, tokenizer="demo", **options)


def changed(old: str, new: str) -> str:
    path = Path(requests())
    path.write_text(path.read_text().replace(old, new))
    return str(path)


def one_class() -> TextClassificationData:
    return text(requests(labels=("polite", "polite")))


def no_header() -> TextClassificationData:
    return text(changed("text,label\n", ""))


def empty_split() -> TextClassificationData:
    Path("empty.csv").write_text("text,label\n")
    return text(requests(), validation="empty.csv")


def empty_file() -> TextClassificationData:
    Path("nothing.csv").touch()
    return text("nothing.csv")


def broken_file() -> TextClassificationData:
    Path("broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    return text("broken.jsonl")


def label_only_in_test() -> TextClassificationData:
    return text(requests(), test=write("test.csv", [{"text": "hello", "label": "polit"}]))


def tags_of_another_length() -> TokenClassificationData:
    rows = [{"tokens": ["a", "b"], "tags": ["O", "X"]}, {"tokens": ["a", "b"], "tags": ["O"]}]
    return TokenClassificationData(write("tags.jsonl", rows), tokenizer="demo")


def not_a_number() -> TextRegressionData:
    return TextRegressionData(requests(), tokenizer="demo")


def unquoted_commas() -> TextClassificationData:
    Path("commas.csv").write_text("text,label\nhello, there,a\nopen, please,b\n")
    return text("commas.csv")


def semicolons() -> TextClassificationData:
    return text(changed(",", ";"))


def another_encoding() -> TextClassificationData:
    Path("latin.csv").write_bytes("text,label\ncafé,a\ntea,b\n".encode("latin-1"))
    return text("latin.csv")


CASES = [
    (
        unquoted_commas,
        r"row 0 of 'commas.csv' has 3 fields, but the header has 2: put texts that contain ',' into quot",
    ),
    (semicolons, r"requests.csv' has no column 'text': its columns are separated by ';'\. Save it with commas"),
    (another_encoding, r"'latin.csv' is not encoded in UTF-8 .*: save it as UTF-8"),
    (one_class, r"column 'label' of '.*requests.csv' has only the label 'polite': a classifier needs at least two"),
    (no_header, r"requests.csv' has no column 'text'; it has .*, polite\. If this is .* add a header line"),
    (empty_split, r"the validation split is empty: 'empty.csv' has no rows"),
    (empty_file, r"'nothing.csv' is empty"),
    (broken_file, r"'broken.jsonl' cannot be read as json: "),
    (
        label_only_in_test,
        r"test split contains label 'polit', which never occurs .* \(row 0\); the closest .* 'polite'",
    ),
    (lambda: text(changed("it now,rude", "it now,")), r"row 4 of '.*requests.csv' has no label in the column 'label'"),
    (lambda: text(changed("open it now,", ",")), r"row 4 of '.*requests.csv' has None instead of a text"),
    (lambda: text("request.csv", validation_fraction=0.5), r"there is no file 'request.csv'"),
    (lambda: text("no/such/folder/x.csv"), r"there is no file 'no/such/folder/x.csv'"),
    (lambda: text(requests(), label="labels"), r"no column 'labels' \(did you mean 'label'\?\)"),
    (tags_of_another_length, r"row 1 of '.*tags.jsonl' has 2 words in 'tokens' but 1 labels in 'tags'"),
]


@pytest.mark.parametrize(("make", "message"), CASES)
def test_refused_before_training(make, message, monkeypatch):
    monkeypatch.setattr(TextClassifier, "training_step", lambda *_: pytest.fail("it trained"))
    module = TextClassifier("demo")
    with pytest.raises((InputError, FileNotFoundError), match=message) as error:
        L.Trainer(max_steps=1, callbacks=[lp.LoRA(r=2)], **QUIET).fit(module, make())
    assert "\n" not in str(error.value)


def test_names_where_numbers_are_needed_and_numbers_where_names_are():
    with pytest.raises(
        InputError, match=r"row 0 of '.*' has 'polite' in the column 'label': regression needs a finite"
    ):
        L.Trainer(max_steps=1, **QUIET).fit(TextRegressor("demo"), not_a_number())
    path = write("scores.csv", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}])
    with pytest.raises(InputError, match=r"holds numbers such as 0.5, not labels: .* TextRegressor"):
        L.Trainer(max_steps=1, **QUIET).fit(TextClassifier("demo"), text(path))


def test_labels_of_a_hub_dataset_outside_their_range():
    import datasets

    from lightning_peft.data.labels import label_values

    table = datasets.Dataset.from_dict({"label": [0, -1]}).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    with pytest.raises(InputError, match=r"row 1 of 'x' has the label -1 .* outside the range 0 to 1"):
        label_values(table, "label", "x")


def test_texts_beyond_the_positions(gpt2):
    path = write("long.csv", [{"text": "word " * 200, "label": label} for label in "ab"])
    with pytest.raises(
        InputError, match=r"row 0 of '.*long.csv' has \d+ tokens, but the model has 128 positions: pass"
    ):
        L.Trainer(max_steps=1, **QUIET).fit(TextClassifier(gpt2), TextClassificationData(path, max_length=300))


def test_a_tokenizer_without_padding():
    shutil.copytree(demo.MODEL, "model")
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None, "eos_token": None}))
    with pytest.raises(InputError, match=r"tokenizer of 'model' has no padding token and no end-of-text token"):
        load_tokenizer("model")


def test_unknown_metrics():
    with pytest.raises(
        InputError, match=r"TextClassifier has no metric 'precison' \(did you mean 'precision'\?\); it has acc, "
    ):
        TextClassifier("demo", metrics=["precison"])
    with pytest.raises(InputError, match="a masked language model does not write texts"):
        LanguageModel("demo", metrics=["bleu"])
    stop = L.pytorch.callbacks.EarlyStopping("val/accuracy")
    with pytest.raises(InputError, match=r"EarlyStopping monitors 'val/accuracy' \(did you mean 'val/acc'\?\), but"):
        L.Trainer(max_steps=1, callbacks=[stop], **QUIET).fit(TextClassifier("demo"), text(requests()))


def test_a_model_that_cannot_be_found():
    with pytest.raises(
        InputError, match=r"model='no/such' is neither a folder nor a model of the .* hub that can be rea"
    ):
        LanguageModel("no/such", objective="causal")


def test_weights_of_another_network(gpt2):
    shutil.copytree(gpt2, "model")
    save_file({"of.another": torch.zeros(2)}, "model/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"weights of 'model' do not fit GPT2LMHeadModel: .* parameters are missing"):
        LanguageModel("model")


def test_the_command_line_answers_in_one_line():
    from lightning_peft.cli.main import main

    requests()
    flags = ["--data.source=requests.csv", "--data.label=lable", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    with pytest.raises(SystemExit, match=r"^error: 'requests.csv' has no column 'lable' \(did you mean 'label'\?\)"):
        main(["fit", "--model=TextClassifier", "--data=TextClassificationData", *flags, "--trainer.callbacks+=LoRA"])
