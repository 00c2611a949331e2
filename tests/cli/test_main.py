"""The command line as a user runs it: flags, YAML, resume, errors, and the user's own script."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from console import run
from modules import Module

import lightning_peft as lp
from lightning_peft.cli.main import OWN, main
from lightning_peft.cli.methods import command_name, exported

HERE = Path(__file__).parent
RUN = [
    "--model=modules.Module",
    "--data=modules.Data",
    "--trainer.max_epochs=2",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.default_root_dir=.",
]
LORA = ["--method=LoRA", "--method.r=4", "--method.trainable=[head]"]


@pytest.fixture(autouse=True)
def _user_path(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def printed_config(*args: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code == 0
    return out.getvalue()


def checkpoint() -> Path:
    (found,) = Path("checkpoints").glob("*.ckpt")
    return found


def test_flags_fit_and_save_the_trainable_state():
    out = run("fit", *RUN, *LORA)
    state = torch.load(checkpoint(), weights_only=True)["state_dict"]
    assert {key.rpartition(".")[2] for key in state} == {"lora_A", "lora_B", "weight", "bias"}
    assert {key for key in state if "adapters" not in key} == {"head.weight", "head.bias"}
    assert "LoRA r=4" in out
    assert "full model" in out


def test_a_printed_config_runs_again_resumes_and_tests():
    Path("run.yaml").write_text(printed_config(*RUN, *LORA))
    assert yaml.safe_load(Path("run.yaml").read_text())["method"]["init_args"]["r"] == 4
    run("fit", "--config=run.yaml")
    first = checkpoint()
    run("fit", "--config=run.yaml", "--trainer.max_epochs=3", f"--ckpt_path={first}")
    run("test", "--config=run.yaml", f"--ckpt_path={first}")
    run("validate", "--config=run.yaml", f"--ckpt_path={first}")


def test_the_optimizer_of_the_command_line_gets_the_adapters():
    run("fit", *RUN, *LORA, "--optimizer=SGD", "--optimizer.lr=0.01")
    loaded = torch.load(checkpoint(), weights_only=True)
    b = [value for key, value in loaded["state_dict"].items() if key.endswith("lora_B")]
    assert b
    assert all(value.abs().sum() > 0 for value in b)


def test_inspect_shows_the_table_and_trains_nothing():
    Path("run.yaml").write_text(printed_config(*RUN, *LORA))
    out = run("inspect", "--config=run.yaml")
    assert "body.*" in out
    assert "parameters train" in out
    assert not Path("checkpoints").exists()


def test_inspect_of_a_path_needs_no_model():
    run("fit", *RUN, *LORA)
    out = run("inspect", str(checkpoint()))
    assert "LoRA" in out
    for path, message in (("nowhere", "there is no file or directory nowhere"), (".", "has no adapter_config.json")):
        with pytest.raises(SystemExit) as stop:
            run("inspect", path)
        assert message in str(stop.value.code)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--method.targets=bodi.0", "'bodi.0' matches nothing; nearest: body.0"),
        ("--method.r=1000", "r=1000 is above both sides of 'body.0' (16x16)"),
        ("--method.r=0", "r must be an integer of at least 1, got 0"),
        ("--method.dropout=1.5", "dropout must be a probability in [0, 1), got 1.5"),
    ],
)
def test_a_user_error_prints_one_line_and_exits_with_an_error(argument, message):
    with pytest.raises(SystemExit) as stop:
        run("fit", *RUN, *LORA, argument)
    assert stop.value.code not in (0, None)
    assert message in str(stop.value.code)


def test_a_flag_changes_the_method_of_a_file_or_replaces_or_extends_it():
    Path("run.yaml").write_text("method: {class_path: LoRA, init_args: {r: 4, targets: [body], trainable: [head]}}")

    def methods(*flags: str) -> list[tuple[str, dict]]:
        method = yaml.safe_load(printed_config("--config=run.yaml", *RUN, *flags))["method"]
        found = method if isinstance(method, list) else [method]
        return [(m["class_path"].rpartition(".")[2], m["init_args"]) for m in found]

    ((name, arguments),) = methods("--method.r=16")
    assert (name, arguments["r"], arguments["trainable"]) == ("LoRA", 16, ["head"])
    ((name, arguments),) = methods("--method=IA3")
    assert (name, arguments["targets"], arguments["trainable"]) == ("IA3", "all-key-value", [])
    (lora, (name, arguments)) = methods("--method+=BottleneckAdapter", "--method.name=top")
    assert (lora[1]["r"], name, arguments["name"]) == (4, "BottleneckAdapter", "top")


def test_a_list_of_methods_trains_together_and_is_tested():
    Path("run.yaml").write_text(
        "method:\n- {class_path: LoRA, init_args: {name: lora, trainable: [head]}}\n- BitFit\n"
        "trainer: {callbacks: [{class_path: LoHa, init_args: {name: third}}]}\n"
    )
    assert "LoHa" in run("fit", "--config=run.yaml", *RUN)
    manifest = torch.load(checkpoint(), weights_only=True)["lightning_peft"]
    assert [entry["method"] for entry in manifest["methods"]] == ["LoRA", "BitFit", "LoHa"]
    assert "test/loss" in run("test", "--config=config.yaml", f"--ckpt_path={checkpoint()}")
    assert "BitFit" in run("inspect", "--config=config.yaml")


class Prepared(Module):
    """A module that applies its method itself."""

    def configure_model(self):
        lp.apply(self, lp.LoRA(trainable=["head"]))


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (["--model=modules.Module"], ["--data=modules.Data"]),
        (["--model=TextClassifier", "--model.model=demo"], ["--data=TextClassificationData", "--data.source=demo"]),
    ],
)
def test_a_fit_without_a_method_is_refused(model, data):
    with pytest.raises(SystemExit, match=r"no method is given.*--method LoRA.*--method FullFineTuning"):
        run("fit", *RUN, *model, *data)
    assert not Path("checkpoints").exists()


def test_a_module_that_applies_a_method_itself_needs_none():
    run("fit", *RUN, f"--model={__name__}.Prepared")


def test_two_methods_under_one_name():
    with pytest.raises(SystemExit, match="give each its own name"):
        run("fit", *RUN, *LORA, "--method+=LoRA")


def test_methods_lists_and_explains():
    assert "lora" in run("methods")
    assert "2106.09685" in run("methods", "lora")
    with pytest.raises(SystemExit, match="nearest: lora"):
        run("methods", "lorra")


@pytest.mark.parametrize("method", exported(), ids=command_name)
def test_every_method_is_explained(method):
    text = " ".join(run("methods", command_name(method)).split())
    assert "arXiv:" in text or "openreview.net" in text
    for part in ("Choose it", "cost", "Args:", "Example::", f"lp.{method.__name__}("):
        assert part in text, part
    assert "`" not in text
    first_line = method.__doc__.partition("\n")[0]
    assert first_line.endswith(".")
    assert first_line in text


@pytest.mark.parametrize("command", OWN)
def test_each_command_has_help(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: lightning-peft {command}" in out.getvalue()


def test_an_unknown_command_is_answered_with_the_nearest():
    with pytest.raises(SystemExit, match="there is no command 'exprot'; nearest: export"):
        run("exprot")


def test_a_module_in_the_current_folder_is_found(monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    run("fit", *RUN, *LORA)
    Path("beside_the_user.py").write_text("from modules import Module\n")
    run("merge", str(checkpoint()), "out", "--model=beside_the_user.Module")
    assert Path("out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["merge", "none.ckpt", "out", "--model=modules.Module"], "none.ckpt"),
        (["export", "none.ckpt", "out"], "none.ckpt"),
        (["import", "none", "out.ckpt", "--model=modules.Module"], "there is no directory none"),
        (["import", ".", "out.ckpt", "--model=modules.Module", "--model.wdth=3"], "has no argument wdth: "),
        (["import", ".", "out.ckpt", "--model=modules.Data"], "modules.Data is not a LightningModule"),
    ],
)
def test_an_error_of_a_command_is_one_line(args, message):
    with pytest.raises(SystemExit, match=rf"^error: .*{message}"):
        main(args)


def test_module_and_own_script_in_a_fresh_process():
    def python(*args: str) -> str:
        ran = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    assert "fit" in python("-m", "lightning_peft", "--help")
    callbacks = [flag.replace("--method", "--trainer.callbacks").replace("callbacks=", "callbacks+=") for flag in LORA]
    out = python(str(HERE / "modules.py"), "fit", *RUN[2:], *callbacks)
    assert "LoRA r=4" in out
    assert checkpoint().is_file()


def test_a_checkpoint_gives_the_arguments_and_never_the_class(capsys):
    run("fit", *RUN, *LORA, "--model.width=8", "--data.width=8")
    path = checkpoint()
    Path("hostile_library.py").write_text("raise SystemExit('it ran')")
    saved = torch.load(path, weights_only=True)
    for said in ({}, {"_class_path": "hostile_library.Evil", "_instantiator": "hostile_library.evil"}):
        torch.save({**saved, "hyper_parameters": {"width": 8, "lr": 1e-2, **said}}, path)
        assert "test/loss" in run("test", *RUN, *LORA, "--data.width=8", f"--ckpt_path={path}")
    assert "hostile_library" not in sys.modules


def test_a_checkpoint_that_would_run_code_is_refused():
    Path("evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch it_ran'\ntR.")
    with pytest.raises(SystemExit, match=r"error: .*evil\.ckpt"):
        run("test", *RUN, *LORA, "--ckpt_path=evil.ckpt")
    assert not Path("it_ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=LoRA", "--method.lora_alpha=8"], "LoRA does not have an argument 'lora_alpha': it is called alpha"),
        (["--method=[{class_path: LoRA, init_args: {lora_alpha: 8}}]"], "it is called alpha here"),
        (["--trainer.callbacks+=LoRA", "--trainer.callbacks.lora_alpha=8"], "it is called alpha here"),
        (["--method=LoRA", "--method.use_dora=true"], "'use_dora': use --method DoRA"),
        (["--method.r=8"], "--method.r is given, but no method: add --method LoRA"),
        (["--method=Lora"], "no method is called 'Lora'; nearest: LoRA. `lightning-peft methods` lists all"),
        (["--method=prefix-tuning"], "nearest: PrefixTuning"),
        (
            ["--method=LoRA", "--method.r=x"],
            "'lightning_peft.LoRA': Parser key \"r\": Expected a <class 'int'>. Got value: x",
        ),
        (
            ["--data=modules.Data", "--data.batch=8"],
            "Data does not have an argument 'batch': it is called batch_size here",
        ),
    ],
)
def test_a_wrong_argument_is_answered_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model=lightning.pytorch.demos.boring_classes.BoringModel", *arguments])
    tip, error = capsys.readouterr().err.splitlines()
    assert tip.startswith("tip: ")
    assert error.startswith("error: ")
    assert message in error
