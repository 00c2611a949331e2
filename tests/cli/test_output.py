"""What a fit prints and writes: the methods, the results and the next command, and nothing of other packages."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from console import run
from modules import Data, Module

import lightning_peft as lp

HERE = Path(__file__).parent
FIT = [
    *("fit", "--model=TextClassifier", "--model.model=demo", "--data=TextClassificationData", "--data.source=demo"),
    *("--method=LoRA", "--method.r=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_epochs=1"),
    *("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1"),
]


def test_a_run_prints_its_own_output_only_within_80_columns():
    """In a separate process: tips and load reports are printed when packages are first used."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-m", "lightning_peft", *FIT, "--trainer.enable_progress_bar=false"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = ran.stdout + ran.stderr
    for other in (
        "Tip",
        "GPU",
        "LOAD REPORT",
        "Warning",
        "deprecated",
        "Total params",
        "Seed",
        "entry point",
        "`Trainer",
    ):
        assert other not in said, f"{other}: {said}"
    lines = [line for line in ran.stdout.splitlines() if not line.startswith(("train: ", "checkpoint "))]
    assert max(map(len, lines)) <= 80
    assert "LoRA r=2" in ran.stdout
    assert re.search(r"val/loss .*\d", ran.stdout)
    assert lines[-3:] == [
        "Next: lightning-peft predict \\",
        "  --config config.yaml \\",
        f"  --ckpt_path {next(Path().glob('checkpoints/*.ckpt'))}",
    ]
    with (Path("checkpoints") / "curves.csv").open() as file:
        points = [(row["metric"], int(row["step"])) for row in csv.DictReader(file)]
    assert {("train/loss", 1), ("train/loss", 2), ("val/acc", 2), ("val/loss", 2)} <= {*points}
    pytest.importorskip("matplotlib")
    assert Path("checkpoints/curves.png").stat().st_size > 1000


@pytest.mark.parametrize("shows", [True, False])
def test_enable_model_summary_silences_the_table(shows, capsys, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(callbacks=[lp.LoRA(trainable=["head"])], enable_model_summary=shows, **options)
    trainer.fit(Module(), Data())
    assert ("LoRA r=8" in capsys.readouterr().out) == shows
    flags = [f"--trainer.enable_model_summary={str(shows).lower()}", "--trainer.fast_dev_run=true"]
    assert ("LoRA r=8" in run("fit", "--model=modules.Module", "--data=modules.Data", "--method=LoRA", *flags)) == shows
