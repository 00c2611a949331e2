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


def test_halving_continues_the_best_run_exactly():
    Path("base.yaml").write_text(yaml.safe_dump({**BASE, "trainer": {**BASE["trainer"], "max_steps": 12}}))
    methods = [*COMPARE[:4], "LoRA,BitFit,VeRA,FullFineTuning", *COMPARE[5:], "--trials=1", "--seeds=1"]
    out = run(*methods, "--halving", "--finalists=1", "--search-steps=2", "--max-params=500")
    (halved,) = rows()
    parts = [json.loads(path.read_text()) for path in Path("out/runs").glob("*-to3.json")]
    stopped = next(part["label"] for part in parts if part["label"] != halved["method"])
    assert len(parts) == 2, "half of three: full fine-tuning has more than 500 parameters"
    assert f"- **{stopped}**: val/loss" in Path("out/report.md").read_text()
    assert halved["method"] in out.strip().splitlines()[-1]
    rate = json.loads(next(Path("out/runs").glob("*-seed0.json")).read_text())["values"]["lr"]
    entry = {halved["method"]: {"trainable": ["head"], "lr": rate}}
    Path("one.yaml").write_text(yaml.safe_dump({"methods": entry}))
    run(*COMPARE[:4], "one.yaml", "--output=whole", "--seeds=1")
    whole, continued = (json.loads(next(Path(f).glob("*-seed0.json")).read_text()) for f in ("whole/runs", "out/runs"))
    assert (continued["metric"], continued["losses"]) == (whole["metric"], whole["losses"])


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


def test_forgetting_and_a_group_of_wandb():
    retention = json.dumps({"class_path": "modules.Data", "init_args": {"width": 8, "batch_size": 16}})
    wandb = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.save_dir=logs"]
    methods = ["--methods=LoRA,BitFit", "--trials=0", "--seeds=1", "--scales=0,0.5"]
    run("compare", "-c", "base.yaml", "--output=out", *methods, f"--retention.data={retention}", *wandb)
    lora, bitfit = rows()
    assert all(float(row["forgetting_kl"]) > 0 and row["forgetting_loss"] for row in (lora, bitfit))
    assert Path("out/retention.png").is_file()
    scales = json.loads(next(Path("out/runs").glob("LoRA-*-seed0.json")).read_text())["scales"]
    assert [factor for factor, _, _ in scales] == [1.0, 0.0, 0.5]
    assert scales[0][1:] == [float(lora["val/loss"]), float(lora["forgetting_kl"])]
    assert scales[1][2] == pytest.approx(0, abs=1e-6)
    assert scales[1][1] == pytest.approx(json.loads(Path("out/runs/base.json").read_text())["metric"])
    assert 0 < scales[2][2] < scales[0][2]
    assert len(list(Path("logs").glob("wandb/offline-run-*"))) == 2


def test_retention_in_a_configuration():
    retention = {"data": {"class_path": "modules.Data", "init_args": {"width": 8}}, "limit": 9.0}
    callbacks = [
        {"class_path": "lightning_peft.LoRA", "init_args": {"trainable": ["head"]}},
        {"class_path": "lightning_peft.Retention", "init_args": retention},
    ]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}}
    config = {**BASE, "trainer": {**BASE["trainer"], "callbacks": callbacks, "logger": logger}}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    run("fit", "-c", "run.yaml", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")
    (written,) = Path("logs").glob("*/*/metrics.csv")
    assert "retention/kl" in written.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retention.data={class_path: Nowhere}"], "--retention.data {class_path: Nowhere} cannot be built"),
        (["--trainer.callbacks+=LoRA"], "already has a method (LoRA)"),
        (["--metric=val/acc"], "does not log 'val/acc' in this evaluation; it logs val/loss"),
        (["--no-such-flag=1"], "no-such-flag"),
        (["--methods=Lora,Lora"], "give different names"),
        (["--fractions=2"], "above 0 and at most 1"),
        (["--halving", "--keep=0.9"], "--keep asks for a small or fast method"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*COMPARE, "--trials=0", *arguments)
    assert message in str(stop.value.code)
