"""The configuration and the checkpoint of a fit are enough for the next command, from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from console import run

from lightning_peft.cli.main import main
from lightning_peft.cli.runs import files_first

HERE = Path(__file__).parent
MODULE = """
from jsonargparse.typing import Path_fr
from pathlib import Path
from modules import Data, Module

class Mine(Module):
    def predict_step(self, batch, batch_idx):
        return self(batch[0])

class MyData(Data):
    predict_dataloader = Data.val_dataloader

    def __init__(self, width: int = 16, table: Path_fr | None = None):
        super().__init__(width)
        assert table is None or Path(table).read_text() == "a table"

class Alone(Mine):
    train_dataloader = lambda self: Data().train_dataloader()
"""
TRAINER = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}},
    "callbacks": [{"class_path": "lightning_peft.LoRA", "init_args": {"r": 2, "trainable": ["head"]}}],
}


def write_project(name: str) -> Path:
    """``name.py`` with a module, and a configuration and a file that it names in another folder."""
    Path(f"{name}.py").write_text(MODULE)
    conf = Path("conf")
    conf.mkdir()
    (conf / "table.txt").write_text("a table")
    config = {
        "model": {"class_path": f"{name}.Mine", "init_args": {"width": 8}},
        "data": {"class_path": f"{name}.MyData", "init_args": {"width": 8, "table": "table.txt"}},
        "trainer": TRAINER,
    }
    (conf / "run.yaml").write_text(yaml.safe_dump(config))
    return conf / "run.yaml"


@pytest.fixture(autouse=True)
def _user_path(monkeypatch):
    """The path of the installed script, which does not have the folder of the user."""
    monkeypatch.setattr(sys, "path", [*(entry for entry in sys.path if entry), str(HERE)])


def fitted(name: str) -> tuple[Path, Path]:
    """The configuration and the checkpoint that a fit wrote."""
    run("fit", "--config", str(write_project(name)))
    (checkpoint,) = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
    return Path("lightning_logs/version_0/config.yaml"), checkpoint


def loss(output: str) -> str:
    return next(line.split("│")[2].strip() for line in output.splitlines() if "/loss" in line)


def test_every_command_runs_on_the_files_of_a_fit():
    config, checkpoint = fitted("after_fit")
    files = ["--config", str(config), "--ckpt_path", str(checkpoint)]
    with pytest.warns(UserWarning, match="no --ckpt_path is given") as warned:
        untrained = loss(run("test", "--config", str(config)))
    assert str(checkpoint) in str([w.message for w in warned])
    trained = loss(run("test", *files))
    assert trained != untrained
    assert loss(run("validate", *files)) == trained
    run("predict", *files)
    assert "body.*" in run("inspect", *files)
    run("fit", *files, "--trainer.max_epochs=2")
    (resumed,) = Path("lightning_logs").glob("*/checkpoints/epoch=1-step=8.ckpt")
    assert torch.load(resumed, weights_only=True)["global_step"] == 8
    run("fit", "--config", str(config))


OWN_METHOD = """
import lightning_peft as lp

class Rescaled(lp.IA3):
    \"\"\"IA3 under another name.\"\"\"
"""


def test_a_checkpoint_brings_its_methods_and_import_makes_own_ones_known():
    Path("own_method.py").write_text(OWN_METHOD)
    flags = [f"--{key}={value}" for key, value in (("model", "rebuilt.Mine"), ("data", "rebuilt.MyData"))]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    write_project("rebuilt")
    methods = ["--method+=LoRA", "--method.r=2", "--method.trainable=[head]", "--method+=Rescaled", "--method.name=own"]
    run(
        "fit",
        "--import",
        "own_method",
        *flags,
        *methods,
        "--method.targets=[body.0]",
        "--method.feedforward_targets=[]",
    )
    (checkpoint,) = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
    base = loss(run("test", *flags))
    tested = loss(run("test", "--import=own_method", *flags, f"--ckpt_path={checkpoint}"))
    assert tested != base
    with_config = ["--config=lightning_logs/version_0/config.yaml", f"--ckpt_path={checkpoint}"]
    assert loss(run("test", *with_config)) == tested
    run("predict", "--import=own_method", *flags, f"--ckpt_path={checkpoint}")
    run("fit", "--import=own_method", *flags, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2")
    run("export", "--import=own_method", str(checkpoint), "exported", "--model=rebuilt.Mine")
    assert Path("exported/own/adapter_config.json").is_file()
    with pytest.raises(SystemExit, match=r"error: --import no_module: .*Give the name of a Python module"):
        run("methods", "--import=no_module")


def test_the_method_of_a_hostile_checkpoint_cannot_exhaust_the_memory():
    _, checkpoint = fitted("hostile_rank")
    saved = torch.load(checkpoint, weights_only=True)
    config = {"bottleneck_size": 10**10, "targets": ["body.0"], "name": "default"}
    saved["lightning_peft"]["methods"][0].update(method="BottleneckAdapter", config=config)
    del saved["lightning_peft"]["digests"]
    torch.save(saved, checkpoint)
    flags = ["--model=hostile_rank.Mine", "--data=hostile_rank.MyData", "--data.width=8", f"--ckpt_path={checkpoint}"]
    with pytest.raises(SystemExit, match="asks for a tensor of"):
        run("test", *flags, "--trainer.accelerator=cpu")


def test_a_flag_overrides_a_file_in_any_order():
    config, checkpoint = fitted("flag_first")
    after = run("test", "--config", str(config), "--ckpt_path", str(checkpoint))
    assert loss(run("test", "--ckpt_path", str(checkpoint), "--config", str(config))) == loss(after)


@pytest.mark.parametrize(
    ("given", "sorted_"),
    [
        ("fit --a 1 --config x --b=2 --config=y", "fit --config x --config=y --a 1 --b=2"),
        ("test -c x --a 1", "test -c x --a 1"),
        ("--config x fit --a 1", "--config x fit --a 1"),
        ("fit --method X -c y", "fit -c y --method=null --method X"),
        ("fit --config", "fit --config"),
        ("", ""),
    ],
)
def test_files_first(given, sorted_):
    assert files_first(given.split()) == sorted_.split()


def test_the_error_for_a_missing_model_names_the_configuration_of_the_run():
    config, checkpoint = fitted("not_named")
    for command in ("fit", "test", "validate", "predict", "inspect"):
        with pytest.raises(SystemExit, match=f"{command}: --model is missing.* add --config {config}, "):
            run(command, "--ckpt_path", str(checkpoint))
    with pytest.raises(SystemExit, match=r"add --config run\.yaml or --model"):
        run("fit")


def test_best_is_not_known_in_a_new_process():
    config, checkpoint = fitted("best_of_none")
    with pytest.raises(SystemExit, match=f"has no best checkpoint.*--ckpt_path {checkpoint}"):
        run("test", "--config", str(config), "--ckpt_path", "best")


def test_a_test_leaves_the_configuration_of_the_fit_in_the_same_folder():
    config = write_project("one_folder")
    run("fit", "--config", str(config), "--trainer.logger=false")
    saved = Path("config.yaml").read_text()
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    run("test", "--config=config.yaml", f"--ckpt_path={checkpoint}", "--trainer.logger=false")
    assert Path("config.yaml").read_text() == saved


def test_a_module_with_loaders_of_its_own_needs_no_data():
    config = str(write_project("own_loaders"))
    run("fit", "--config", config, "--model=own_loaders.Alone", "--data=null", "--model.width=16")


def test_a_module_that_is_not_on_the_path(tmp_path, monkeypatch, capsys):
    config, checkpoint = (path.absolute() for path in fitted("in_another_folder"))
    monkeypatch.delitem(sys.modules, "in_another_folder")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(config.parents[2])])
    with pytest.raises(SystemExit):
        main(["test", "--config", str(config), "--ckpt_path", str(checkpoint)])
    assert "start it from the folder that has the module" in capsys.readouterr().err
    monkeypatch.syspath_prepend(config.parents[2])
    assert "test/loss" in run("test", "--config", str(config), "--ckpt_path", str(checkpoint))


def test_the_installed_script_starts_processes_that_find_the_module(tmp_path):
    config = write_project("two_processes")
    script = tmp_path / "bin" / "lightning-peft"
    script.parent.mkdir()
    script.write_text("from lightning_peft.cli.main import main\nmain()\n")
    command = [sys.executable, str(script), "fit", "--config", str(config), "--trainer.devices=2"]
    environment = {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "num_processes=2" in ran.stderr or "MEMBER: 2/2" in ran.stderr
