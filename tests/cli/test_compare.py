"""``lightning-peft compare`` on a small module: the files, the last lines, a kill, a failing method."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from console import run

from lightning_peft.cli.main import main
from lightning_peft.compare.run import Runner

HERE = Path(__file__).parent
BASE = {
    "model": {"class_path": "modules.Module", "init_args": {"width": 8}},
    "data": {"class_path": "modules.Data", "init_args": {"width": 8}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "logger": False,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": "val/loss"}}
        ],
    },
}
COMPARE = ["compare", "-c", "base.yaml", "--methods", "LoRA,BitFit,PrefixTuning", "--output", "out", "--trainable=head"]


@pytest.fixture(autouse=True)
def _project(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    Path("base.yaml").write_text(yaml.safe_dump(BASE))


def rows() -> list[dict[str, str]]:
    with Path("out/results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_killed_comparison_goes_on_and_writes_everything(monkeypatch):
    train, started = Runner._fit, []

    def fit(self, flags, *args, **kwargs):
        started.append(flags)
        if len(started) == 4:
            raise KeyboardInterrupt
        return train(self, flags, *args, **kwargs)

    monkeypatch.setattr(Runner, "_fit", fit)
    with pytest.raises(KeyboardInterrupt):
        main([*COMPARE, "--trials=2"])
    assert not Path("out/results.csv").exists()
    out = run(*COMPARE, "--trials=2")
    # 2 trials each for two methods, 1 that fails, 2 seeds each; the interrupted trial was started again.
    assert len(started) == 2 * 2 + 1 + 2 * 2 + 1
    header = "method,seed,val/loss,trainable,step_ms,peak_mb,checkpoint_mb,forgetting_loss,forgetting_kl,config"
    assert Path("out/results.csv").read_text().partition("\n")[0] == header
    assert [(row["method"], row["seed"]) for row in rows()] == [(m, s) for m in ("LoRA", "BitFit") for s in "01"]
    assert all(float(row[name]) > 0 for row in rows() for name in ("val/loss", "step_ms", "peak_mb", "checkpoint_mb"))
    assert {row["method"]: row["trainable"] for row in rows()} == {"LoRA": "402", "BitFit": "42"}
    assert "failed: PrefixTuning: TargetError" in out
    report = Path("out/report.md").read_text()
    assert "- **PrefixTuning**: TargetError" in report
    assert {path.name for path in Path("out").glob("*.png")} == {"costs.png", "curves.png"}
    assert not list(Path.cwd().glob("*checkpoints")), "compare leaves no files of runs"
    last = out.strip().splitlines()[-1]
    assert last.startswith("lightning-peft fit -c base.yaml --method=")
    assert last in report
    run(*last.replace("'", "").split()[1:], "--trainer.enable_progress_bar=false")  # and it trains
    assert json.loads(rows()[0]["config"])["arguments"][0] in ("--method=LoRA")


def test_fractions_of_the_data_and_a_budget():
    out = run(
        *COMPARE[:4],
        "BitFit,NormTuning,LoRA",
        *COMPARE[5:],
        "--trials=0",
        "--seeds=1",
        "--fractions=0.25,1",
        "--max-params=100",
        "--finalists=1",
    )
    assert [(row["method"], row["fraction"]) for row in rows()] == [
        ("BitFit", "0.25"),
        ("LoRA", "0.25"),
        ("BitFit", "1.0"),
        ("LoRA", "1.0"),
    ]
    assert rows()[0]["val/loss"] != rows()[2]["val/loss"]
    assert "LoRA is over the budget: 402 trainable parameters" in out
    assert out.count("Take BitFit.") == 2
    assert Path("out/fractions.png").is_file()


def test_auto_takes_one_of_each_family_that_fits():
    run("compare", "-c", "base.yaml", "--output=out", "--trials=0", "--seeds=1", "--trainable=head")
    assert [row["method"] for row in rows()] == ["LoRA", "BitFit", "FullFineTuning"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.callbacks+=LoRA"], "already has a method (LoRA)"),
        (["--metric=val/acc"], "does not log 'val/acc' in this evaluation; it logs val/loss"),
        (["--no-such-flag=1"], "no-such-flag"),
        (["--methods=Lora,Lora"], "give different names"),
        (["--fractions=2"], "above 0 and at most 1"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*COMPARE, "--trials=0", *arguments)
    assert message in str(stop.value.code)
