"""The studies on real data: the runner on a fake study, and a few steps of each real study whose data is present."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_peft as lp
from benchmarks.real import STUDIES, load
from benchmarks.real.__main__ import main
from benchmarks.real.e2e import named
from benchmarks.real.store import Store
from benchmarks.real.study import DATA, MissingData, Row, Study, search
from lightning_peft.data import ImageData
from lightning_peft.tasks import ImageClassifier

torch.manual_seed(0)


class Tiny(Study):
    name, title, task, probes = "tiny", "A tiny study", "Red or not.", "Does the rank matter?"
    metrics = {"accuracy %": "{:.1f}", "loss": "{:.3f}"}
    higher_is_better, steps, search_steps = True, 3, 2
    prompts = ("what does it say?",)
    rows = (
        Row("base"),
        Row("LoRA", "LoRA", {"r": 1, "targets": "1"}, 0.1),
        Row("DoRA", "DoRA", {"r": 1, "targets": "1"}, lr_of="LoRA"),
        Row("one from the future", "NoSuchMethod", {}, 0.1),
        Row("LoRA r=2", "LoRA", {"r": 2, "targets": "1"}, lr_of="LoRA", probe=True),
        Row("full fine-tuning", "FullFineTuning", {}, 0.01),
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
        found = trainer.test(module, data, verbose=False)[0]
        return {"accuracy %": 100 * found["test/acc"], "loss": found["test/loss"]}

    def samples(self, module):
        return ["what it says"]


def network():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("benchmarks.real.__main__.load", lambda name: Tiny())


def test_every_row_is_trained_for_each_seed_and_written(tiny, tmp_path, capsys):
    page, runs = tmp_path / "results" / "tiny.md", tmp_path / "runs.jsonl"
    command = ["e2e", "--seeds", "0", "1", "--store", str(runs), "--markdown", str(page)]
    assert main(command) == 0
    shown, text = capsys.readouterr().out, page.read_text()
    assert shown.count("skipped: one from the future: lightning_peft has no NoSuchMethod") == 1
    assert "3 steps of AdamW" in text
    assert "means over the seeds 0, 1" in text
    assert "| base | 0 | 0 |" in text
    assert "    - what it says" in text
    assert f"torch {torch.__version__}" in text
    assert page.with_suffix(".svg").stat().st_size > 5000
    compared, _, probes = text.partition("## Variants of some methods")
    assert "| LoRA | 50 | 33.8 |" in compared
    assert "| LoRA r=2 |" not in compared
    assert "Does the rank matter?\n\n| method" in probes
    assert "| LoRA r=2 | 100 |" in probes.partition("##")[0]
    assert '"DoRA" uses the rate of "LoRA".' in text
    line = next(line for line in compared.splitlines() if line.startswith("| LoRA |"))
    losses = [r.scores["loss"] for r in _runs(runs, "LoRA(r=1", tuning=False)]
    assert len(losses) == 2
    assert f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f}" in line

    before = runs.read_text()
    assert main(command) == 0  # every run is in the store, so nothing runs again and the page is the same
    assert runs.read_text() == before
    assert page.read_text() == text


def _runs(path, method, tuning):
    results = Store(path).all().values()
    return [r for r in results if r.setting.method.startswith(method) and r.setting.tuning == tuning]


def test_an_interrupted_study_continues(tiny, monkeypatch, tmp_path):
    whole, halves = tmp_path / "whole.jsonl", tmp_path / "halves.jsonl"
    assert main(["e2e", "--methods", "lora", "--store", str(whole)]) == 0
    made, run = [], Study.run

    def interrupted(*args, **kwargs):
        if len(made) == 2:
            made.append(None)
            raise KeyboardInterrupt
        made.append(run(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(Study, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["e2e", "--methods", "lora", "--store", str(halves)])
    assert len(halves.read_text().splitlines()) == 2
    assert main(["e2e", "--methods", "lora", "--store", str(halves)]) == 0
    assert [(r.setting, r.scores) for r in _runs(halves, "LoRA", False)] == [
        (r.setting, r.scores) for r in _runs(whole, "LoRA", False)
    ]
    assert len(made) - 1 == len(whole.read_text().splitlines())


def test_the_rate_is_the_best_of_those_tried(tiny, tmp_path):
    runs = tmp_path / "runs.jsonl"
    assert main(["e2e", "--methods", "lora", "--store", str(runs)]) == 0
    tried = {r.setting.lr: r.scores["loss"] for r in _runs(runs, "LoRA(r=1", tuning=True)}
    (final,) = _runs(runs, "LoRA(r=1", tuning=False)
    assert len(tried) >= 3
    assert final.setting.lr == min(tried, key=tried.get)
    assert min(tried) < final.setting.lr < max(tried)


@pytest.mark.parametrize("best", [1e-4, 3e-3, 1e-2, 3.0])
def test_the_search_walks_to_the_best_rate_and_tries_both_neighbours(best):
    tried = []

    def loss(lr):
        tried.append(lr)
        return abs(np.log(lr / best)) if lr <= 3 * best else float("nan")

    assert search(1e-2, loss) == pytest.approx(best)
    assert len(tried) == len(set(tried))
    assert min(tried) < 0.5 * best
    assert max(tried) > 2 * best


def test_a_search_with_nan_at_every_rate_is_an_error():
    with pytest.raises(ValueError, match=r"NaN at every rate from 0\.01 down"):
        search(1e-2, lambda lr: float("nan"))


def test_the_same_seed_gives_the_same_scores(tmp_path):
    study = Tiny()
    study.prepare(tmp_path, tuning=False)
    first, second = (study.run(study.rows[1], 0.1, 3, seed=4) for _ in range(2))
    assert first.scores == second.scores
    assert first.trainable == 50
    assert first.step_ms > 0
    assert 500 < first.checkpoint < 60_000


def test_a_failing_method_is_reported_and_the_others_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Tiny, "rows", (Row("bad", "LoRA", {"r": 0}, 0.1), Row("base")))
    assert main(["e2e"]) == 1
    shown = capsys.readouterr().out
    assert "failed: bad: ValueError: r must be" in shown
    assert "base, seed 0, lr 0: accuracy" in shown
    assert main(["e2e", "--methods", "nothing"]) == 2


def test_missing_data_is_reported(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.real.study.DATA", DATA)  # --data changes this folder
    assert main(["cifar", "--data", str(tmp_path)]) == 0
    assert f"skipped: there is no cifar_resnet/resnet20-12fca82f.th in {tmp_path}" in capsys.readouterr().out


def test_a_text_names_its_attributes_word_by_word():
    meaning = "name : The Mill | price : more than £30 | family friendly : yes | near : Burger King"
    assert named(meaning, "the  Mill is near Burger King .") == pytest.approx(2 / 3)
    assert named(meaning, "The Mill , more than £30 , near Burger King .") == 1
    assert named(meaning, "yes") == 0


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
    study.tuning, study.asked = False, study.asked[:2]
    base = study.run(study.rows[0], 0.0, 0, seed=0)
    lora = study.run(next(r for r in study.rows if r.method == "LoRA"), 1e-2, 8, seed=0)
    assert lora.scores["loss"] < base.scores["loss"] - 0.5
    assert len(lora.samples) == 2
    assert set(lora.scores) == set(study.metrics)
