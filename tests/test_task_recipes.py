"""Every recipe of a task is bound to the signatures of its classes, and runs on a tiny model and tiny files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_peft import demo
from lightning_peft.cli.main import main
from tests.data.tables import POLITE, RUDE, write
from tests.methods.tiny import vit
from tests.tasks.test_chat import chats
from tests.tasks.test_folders import images, sound, wav2vec2
from tests.tasks.test_seq2seq import folder

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(ROOT.glob("*/*.yaml"))
DEMO = f"--model.model={demo.MODEL}"


def texts(**columns: list) -> None:
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    for name in ("train.csv", "pairs.csv", "articles.csv", "questions.csv"):
        write(name, rows)


def slots(gpt2: str) -> list[str]:
    write("train.jsonl", [{"tokens": text.split(), "tags": ["O"] * (len(text.split()) - 1) + ["X"]} for text in POLITE])
    return [DEMO]


def chat(gpt2: str) -> list[str]:
    chats("chats.jsonl")
    return [f"--model.model={gpt2}", "--data.chat_template=plain", "--data.max_length=100"]


def sentences(gpt2: str) -> list[str]:
    Path("e2e").mkdir()
    Path("e2e/train.txt").write_text("".join(f"{left}||{right}\n" for left, right in zip(POLITE, RUDE)))
    return [f"--model.model={gpt2}", "--model.max_new_tokens=4", "--data.max_length=60"]


def problems(gpt2: str) -> list[str]:
    write("train.jsonl", [{"question": left, "answer": right} for left, right in zip(POLITE, RUDE)])
    return [f"--model.model={gpt2}", "--model.max_new_tokens=4", "--data.max_length=100"]


def arrays() -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for name in ("train.npz", "test.npz"):
        np.savez(name, images=pixels, labels=np.arange(20) % 10)
    return ["--model.network=tests.models.ResNet", "--model.network_args={}"]


def pictures(gpt2: str) -> list[str]:
    images("photos", 3)
    vit().save_pretrained("vit")
    return ["--model.network_args={pretrained_model_name_or_path: vit}", "--data.size=16"]


def recordings(gpt2: str) -> list[str]:
    for name, pitch in (("no", 200), ("yes", 900)):
        for i in range(4):
            sound(Path("words") / name / f"{i}.wav", pitch)
    return [f"--model.model={wav2vec2()}"]


def of_texts(model: str = DEMO, **columns: list):
    def prepare(gpt2: str) -> list[str]:
        texts(**columns)
        return [model if model.startswith("-") else f"--model.model={folder(model)}"]

    return prepare


PREPARE = {
    "text-classification": of_texts(text=[*POLITE, *RUDE], label=["a"] * 4 + ["b"] * 4),
    "sentence-pairs": of_texts(sentence1=POLITE, sentence2=RUDE, score=[1.0, 2.0, 0.5, 3.0]),
    "tokens": slots,
    "summarization": of_texts("t5", article=POLITE, summary=RUDE),
    "chat": chat,
    "question-answering": of_texts(question=RUDE, context=POLITE, answers=[text.split()[0] for text in POLITE]),
    "embeddings": of_texts(question=POLITE, answer=RUDE),
    "images": pictures,
    "e2e": sentences,
    "gsm8k": problems,
    "audio": recordings,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_runs(recipe, gpt2):
    flags = arrays() if recipe.stem.startswith("resnet") else PREPARE[recipe.parent.name](gpt2)
    main(["fit", f"--config={recipe}", "--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", *flags])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_states_its_command(recipe):
    assert f"#   lightning-peft fit --config recipes/{recipe.relative_to(ROOT)}\n" in recipe.read_text()
