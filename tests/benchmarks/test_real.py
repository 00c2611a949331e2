"""The runs on real data: the runner on a made-up study, and a few steps of each real one where its data is."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_peft as lp
from benchmarks.real import STUDIES, load, report
from benchmarks.real.__main__ import main
from benchmarks.real.study import DATA, MissingData, Row, Study
from lightning_peft.data import ImageData
from lightning_peft.tasks import ImageClassifier

torch.manual_seed(0)


class Tiny(Study):
    name, title, task = "tiny", "A tiny study", "Red or not."
    metrics = {"accuracy %": "{:.1f}"}
    higher_is_better, steps, grid = True, 3, "0.1"
    rows = (
        Row("base"),
        Row("LoRA", "LoRA", {"r": 1, "targets": "1"}, 0.1),
        Row("one from the future", "NoSuchMethod", {}, 0.1),
    )

    def prepare(self, folder: Path, tuning: bool) -> None:
        images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
        np.savez(folder / "x.npz", images=images, labels=np.arange(8) % 2)
        self.file = str(folder / "x.npz")

    def module(self, lr: float) -> ImageClassifier:
        return ImageClassifier(f"{__name__}.network", 2, lr=lr)

    def data(self) -> ImageData:
        return ImageData(self.file, test=self.file, batch_size=4)

    def scores(self, trainer, module, data):
        return {"accuracy %": 100 * trainer.test(module, data, verbose=False)[0]["test/acc"]}

    def samples(self, module):
        return ["what it says"]


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("benchmarks.real.__main__.load", lambda name: Tiny())


def test_a_row_is_trained_measured_and_written(tiny, tmp_path, capsys):
    page = tmp_path / "results" / "tiny.md"
    assert main(["e2e", "--markdown", str(page)]) == 0
    shown, text = capsys.readouterr().out, page.read_text()
    assert "skipped: one from the future: lightning_peft has no NoSuchMethod" in shown
    assert "| LoRA | 50 | 33.8 |" in text
    assert "| base | 0 | 0 |" in text
    assert "3 steps of AdamW" in text
    assert "seed 0" in text
    assert "    - what it says" in text
    assert f"torch {torch.__version__}" in text
    assert page.with_suffix(".png").stat().st_size > 5000


def test_the_same_seed_gives_the_same_scores(tmp_path):
    study = Tiny()
    study.prepare(tmp_path, tuning=False)
    first, second = (study.run(study.rows[1], 0.1, 3, seed=4) for _ in range(2))
    assert first.scores == second.scores
    assert first.trainable == 50
    assert first.step_ms > 0
    assert 500 < first.checkpoint < 60_000


def test_tuning_tries_each_rate_and_writes_no_page(tiny, tmp_path, capsys):
    assert main(["e2e", "--tune", "0.1", "0.2", "--methods", "lora"]) == 0
    shown = capsys.readouterr().out
    assert "LoRA, lr 0.1: accuracy" in shown
    assert "LoRA, lr 0.2: accuracy" in shown
    with pytest.raises(SystemExit):
        main(["e2e", "--tune", "0.1", "--markdown", str(tmp_path / "x.md")])


def test_a_failing_method_is_told_and_the_others_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Tiny, "rows", (Row("bad", "LoRA", {"r": 0}), Row("base")))
    assert main(["e2e"]) == 1
    shown = capsys.readouterr().out
    assert "failed: bad: ValueError: r must be" in shown
    assert "base, lr 0: accuracy" in shown
    assert main(["e2e", "--methods", "nothing"]) == 2


def test_missing_data_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("benchmarks.real.study.DATA", tmp_path)
    assert main(["cifar"]) == 0
    assert "skipped: there is no cifar_resnet" in capsys.readouterr().out


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_fits_its_model(name, tmp_path):
    study = load(name)
    try:
        study.prepare(tmp_path, tuning=True)
    except MissingData as reason:
        pytest.skip(str(reason))
    there = [row for row in study.rows if row.method is not None and hasattr(lp, row.method)]
    for row in there:
        found = lp.inspect(study.module(row.lr), getattr(lp, row.method)(**row.arguments))
        assert 0 < found.trainable <= found.total


@pytest.mark.skipif(not (DATA / "stories260K").exists(), reason=f"stories260K is not in {DATA}")
def test_a_few_steps_of_lora_already_beat_the_base(tmp_path):
    study = load("e2e")
    study.prepare(tmp_path, tuning=True)
    study.test.write_text("\n".join(study.test.read_text().splitlines()[:32]))
    study.stories = study.stories[:4000]
    base = study.run(study.rows[0], 0.0, 0, seed=0)
    lora = study.run(next(r for r in study.rows if r.method == "LoRA"), 1e-2, 8, seed=0)
    assert lora.scores["loss"] < base.scores["loss"] - 0.5
    assert len(lora.samples) == 2
    assert len(report.cells(study, lora)) == len(report.headers(study))
