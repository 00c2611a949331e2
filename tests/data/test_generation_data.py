"""GenerationData: the loss is on the target alone, also if texts are cut or padded."""

import json
import shutil

import pytest
import torch

from lightning_peft import demo
from lightning_peft.data import GenerationData


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """The demo's tokenizer; the token that it adds after each text is declared its end-of-text token."""
    folder = tmp_path_factory.mktemp("ending")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(demo.MODEL / name, folder)
    config = json.loads((demo.MODEL / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[SEP]"}))
    return str(folder)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("name : file||open a file .\nname : socket | kind : stream||read from a socket || or not\n")
    return str(path)


def batch_of(data, split="train"):
    data.setup()
    return next(iter(data.val_dataloader() if split == "validation" else data.train_dataloader()))


def decoded(data, labels):
    return data.tokenizer.decode(labels[labels != -100]).strip()


def test_only_the_target_and_its_end_are_predicted(lines, ending):
    data = GenerationData(lines, lines, prompt="text", separator="||", template="{prompt} =>", tokenizer=ending)
    batch = batch_of(data, "validation")
    assert [decoded(data, row) for row in batch["labels"]] == [
        "open a file .[SEP]",
        "read from a socket || or not[SEP]",
    ]
    ids, mask, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert (labels[~mask] == -100).all()
    assert "=> open" in data.tokenizer.decode(ids[0])
    assert (ids[0] == data.tokenizer.eos_token_id).sum() == 1, "a tokenizer that ends each text does not end the prompt"


def test_two_columns_and_left_padding(tmp_path, ending):
    path = tmp_path / "pairs.csv"
    path.write_text("question,answer\nwhat is a list,a mutable sequence\nwhy,because it is so and not otherwise\n")
    data = GenerationData(str(path), str(path), prompt="question", target="answer", tokenizer=ending)
    data.setup()
    data.tokenizer.padding_side = "left"
    labels = next(iter(data.val_dataloader()))["labels"]
    assert decoded(data, labels[0]) == "a mutable sequence[SEP]"
    assert (labels[:, -1] == data.tokenizer.eos_token_id).all()


def test_a_long_prompt_loses_its_beginning_and_a_long_target_its_end(lines, ending):
    data = GenerationData(lines, prompt="text", separator="||", tokenizer=ending, max_length=8)
    data.setup()
    for row in data.examples(data.rows("train"), "train"):
        assert len(row["input_ids"]) == 8
    short = GenerationData(lines, prompt="text", separator="||", tokenizer=ending, max_length=3)
    short.setup()
    first = short.examples(short.rows("train"), "train")[0]
    assert first["target"] == 3
    assert short.tokenizer.decode(first["input_ids"]).strip() == "open a file"


def test_bad_arguments_and_rows_are_named(lines):
    with pytest.raises(ValueError, match=r"template='Say:' has no '\{prompt\}'"):
        GenerationData(lines, template="Say:")
    with pytest.raises(ValueError, match="separator='' cannot separate a prompt"):
        GenerationData(lines, separator="")
    data = GenerationData(lines, prompt="text", separator="=>")
    with pytest.raises(ValueError, match=r"row 0 has no separator '=>': 'name : file"):
        data.pairs([{"text": "name : file||open"}])
    with pytest.raises(ValueError, match="no column 'prompt'"):
        GenerationData(lines).rows("train")
