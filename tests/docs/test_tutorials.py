"""docs/own_texts.md, docs/chat.md and docs/images.md: their commands run in order on tiny files, then their Python."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lightning_peft import demo
from lightning_peft.cli.main import main
from tests.data.tables import POLITE, read, requests, write
from tests.docs.test_pages import ROOT, run, written
from tests.methods.tiny import vit
from tests.tasks.test_chat import chats
from tests.tasks.test_folders import images


def commands(page: str) -> list[list[str]]:
    """The command lines of a page's bash blocks, without the program."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


def with_model(recipe: str, model: str) -> None:
    """Copy a recipe to the current folder, changed to use a local model and to train for one short epoch."""
    text = (ROOT / recipe).read_text()
    text = re.sub(r"(    model: )\S+", rf"\1{model}", text)
    text = re.sub(r"max_epochs: \d+", "max_epochs: 1", text).replace("accelerator: auto", "accelerator: cpu")
    Path(recipe).parent.mkdir(parents=True)
    Path(recipe).write_text(text.replace("max_length: 1024", "max_length: 64\n    chat_template: plain"))


def test_a_table_of_texts(capsys):
    requests("train.csv")
    requests("test.csv")
    write("new.csv", [{"id": i, "text": text} for i, text in enumerate(POLITE)])
    with_model("recipes/text-classification/minilm_lora.yaml", str(demo.MODEL))
    for arguments in commands("docs/own_texts.md"):
        main(arguments)
    assert list(read("predictions.csv")[0]) == ["id", "text", "label", "probability"]
    run(written("docs/own_texts.md"), {})
    assert re.search("'label': '(polite|rude)'", capsys.readouterr().out)


def test_conversations(gpt2):
    chats("chats.jsonl")
    shutil.copy("chats.jsonl", "questions.jsonl")
    write("alpaca.jsonl", [{"instruction": "sort", "input": text, "output": text} for text in POLITE])
    with_model("recipes/chat/llama_lora.yaml", gpt2)
    for arguments in commands("docs/chat.md"):
        main(arguments)
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [list(answer) for answer in answers] == [["messages", "prediction"]] * 4
    run(written("docs/chat.md"), {"model": gpt2})


def test_folders_of_images():
    for folder in ("photos", "test"):
        images(folder, 2)
    Path("new").mkdir()
    shutil.copy(next(Path("photos").rglob("*.*")), "new")
    vit().save_pretrained("vit")
    with_model("recipes/images/vit_lora.yaml", "vit")
    recipe = Path("recipes/images/vit_lora.yaml")
    recipe.write_text(recipe.read_text().replace("google/vit-base-patch16-224", "vit").replace("size: 224", "size: 16"))
    for arguments in commands("docs/images.md"):
        main(arguments)
    (row,) = read("predictions.csv")
    assert list(row) == ["file", "label", "probability"]


@pytest.mark.parametrize("page", ["docs/own_texts.md", "docs/chat.md", "docs/images.md", "docs/from_others.md"])
def test_recipes_that_a_page_names_exist(page):
    named = re.findall(r"recipes/[\w/.-]+\.yaml", (ROOT / page).read_text())
    assert named
    assert all((ROOT / path).is_file() for path in named)
