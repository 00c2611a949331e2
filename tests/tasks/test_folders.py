"""Folders of images and of recordings: classes are folders, every file is checked, and predict needs no classes."""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.data import AudioFolderData, ImageFolderData
from lightning_peft.pretrained import InputError
from lightning_peft.tasks import AudioClassifier, ImageClassifier, PredictionWriter
from tests.data.tables import QUIET, read

COLORS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def images(folder: str = "train", each: int = 4) -> str:
    from PIL import Image

    for name, color in COLORS.items():
        (Path(folder) / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (12 + i, 10), tuple(c + 4 * i for c in color)).save(Path(folder) / name / f"{i}.png")
    return folder


def network(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))


def pictures(source: str, **options) -> ImageFolderData:
    return ImageFolderData(source, size=8, batch_size=4, **options)


def test_images_are_classified_and_named():
    train = images()
    new = Path("new")
    new.mkdir()
    for name in COLORS:
        (Path(train) / name / "0.png").rename(new / f"{name}.png")
    L.seed_everything(0)
    module = ImageClassifier(f"{__name__}.network", lr=0.05)
    data = pictures(train, validation_fraction=0.25, predict="new")
    trainer = L.Trainer(**QUIET, max_epochs=15, callbacks=[lp.LoRA(r=2, targets=["0"]), PredictionWriter()])
    trainer.fit(module, data)
    assert module.labels == list(COLORS)
    assert module.network[4].out_features == 3
    assert module.network[4].weight.requires_grad, "a new output layer trains although no method names it"
    trainer.predict(module, data)
    rows = read("predictions.csv")
    assert list(rows[0]) == ["file", "label", "probability"]
    assert [row["label"] for row in rows] == [Path(row["file"]).stem for row in rows]
    trainer.save_checkpoint("run.ckpt")
    saved = torch.load("run.ckpt", weights_only=True)["state_dict"]
    assert saved["network.4.weight"].shape == (3, 8)


def corrupt(folder: str) -> str:
    Path(folder, "red", "1.png").write_bytes(b"not an image")
    return folder


def truncated(folder: str) -> str:
    path = Path(folder, "red", "1.png")
    path.write_bytes(path.read_bytes()[:-20])
    return folder


def flat(folder: str) -> str:
    Path(folder, "red", "1.png").rename(Path(folder, "1.png"))
    return folder


def other_files(folder: str) -> str:
    Path("texts/a").mkdir(parents=True)
    Path("texts/a/b.txt").touch()
    return "texts"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (corrupt, r"'train/red/1.png' is not a readable image file: cannot identify image file"),
        (truncated, r"'train/red/1.png' is not a readable image file"),
        (flat, r"'train' has image files such as '1.png' outside of a class's folder: put"),
        (other_files, r"'texts' has no image files"),
        (lambda folder: "trian", r"there is no file 'trian' \(did you mean 'train'\?\)"),
        (lambda folder: "train/red", r"'train/red' has image files such as '0.png' outside of a class's folder"),
    ],
)
def test_images_that_cannot_be_used(make, message):
    data = pictures(make(images()))
    with pytest.raises((InputError, FileNotFoundError), match=message):
        L.Trainer(max_steps=1, **QUIET).fit(ImageClassifier(f"{__name__}.network"), data)


def sound(path: Path, pitch: float, rate: int = 16000, width: int = 2, seconds: float = 0.1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [math.sin(2 * math.pi * pitch * i / rate) for i in range(int(rate * seconds))]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 1:
            file.writeframes(bytes(int(127 * v) + 128 for v in values))
        else:
            code, top = {2: ("h", 2**15 - 1), 4: ("i", 2**31 - 1)}[width]
            file.writeframes(struct.pack(f"<{len(values)}{code}", *(int(top * v) for v in values)))


def wav2vec2() -> str:
    """The folder of a tiny wav2vec 2.0 with random weights and a new head."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    stem = {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    torch.manual_seed(0)
    config = Wav2Vec2Config(**sizes, **stem, **position, mask_time_prob=0.0, layerdrop=0.0)
    Wav2Vec2Model(config).save_pretrained("wav2vec2")
    return "wav2vec2"


def test_recordings_are_classified():
    for name, pitch in (("high", 2000), ("low", 200)):
        for i in range(4):
            sound(Path("words") / name / f"{i}.wav", pitch + 20 * i, seconds=0.08 + 0.01 * i)
    module = AudioClassifier(wav2vec2(), lr=0.02)
    data = AudioFolderData("words", "words", predict="words", batch_size=4)
    trainer = L.Trainer(**QUIET, max_epochs=8, callbacks=[lp.FullFineTuning(), PredictionWriter("heard.jsonl")])
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/acc"] == 1
    trainer.predict(module, data)
    assert '"label": "high"' in Path("heard.jsonl").read_text().splitlines()[0]
    sound(Path("words/low/4.wav"), 200, rate=8000)
    with pytest.raises(InputError, match=r"'words/low/4.wav' has 8000 samples per second, but the model expects 16000"):
        L.Trainer(max_steps=1, **QUIET).fit(module, AudioFolderData("words"))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_samples_of_every_width(width):
    from lightning_peft.data.audio import _read

    sound(Path("a.wav"), 440, width=width)
    found, rate = _read(Path("a.wav"), 400)
    wanted = torch.sin(2 * math.pi * 440 * torch.arange(400) / 16000)
    assert rate == 16000
    torch.testing.assert_close(found, wanted, atol=1 / 50, rtol=0)
