"""The commands that need no torch: what they print, and that they import nothing heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_peft as lp
from lightning_peft.cli.main import OWN, PEFTCLI
from lightning_peft.cli.methods import exported
from lightning_peft_command import COMMANDS, main
from lightning_peft_command.methods import read_methods

RECIPES = Path(__file__).parents[2] / "recipes"


def test_help_lists_every_command_within_80_columns(capsys):
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line[:2] == "  " and line[2:3].strip()} >= COMMANDS.keys()
    assert COMMANDS.keys() == {*OWN, *PEFTCLI.subcommands(), "recipes"}


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["methods"], ["methods", "lora"], ["recipes"]])
def test_nothing_heavy_is_imported(args):
    code = f"import sys, lightning_peft_command as c; c.main({args}); print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert not {"torch", "lightning", "transformers", "numpy", "lightning_peft"} & {*ran.stderr.split()}


def test_a_path_is_described_without_lightning(tmp_path):
    folder = tmp_path / "adapter"
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    lp.apply(model, lp.LoRA(r=2, targets=["0"]))
    lp.save_adapter(model, folder)
    code = "import sys, lightning_peft_command as c; c.main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "inspect", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert "LoRA" in ran.stdout
    assert not {"lightning", "transformers", "lightning_peft"} & {*ran.stderr.split()}
    with pytest.raises(SystemExit, match="error: there is no file or directory missing"):
        main(["inspect", "missing"])


def test_version(capsys):
    main(["--version"])
    said = capsys.readouterr().out
    for part in ("lightning_peft ", "Python ", "torch ", "lightning ", "transformers "):
        assert part in said


def test_the_methods_in_the_source_are_those_of_the_package():
    read = {method.name: method for method in read_methods()}
    assert read.keys() == {method.__name__ for method in exported()}
    for method in exported():
        assert read[method.__name__].doc == inspect.getdoc(method)
        assert read[method.__name__].file_doc == inspect.getdoc(sys.modules[method.__module__])


def test_recipes_are_listed_and_copied(capsys):
    main(["recipes"])
    said = capsys.readouterr().out
    for path in {*RECIPES.rglob("*.yaml")} - {RECIPES / "methods.yaml"}:
        assert path.relative_to(RECIPES).with_suffix("").as_posix() in said
    main(["recipes", "copy", "text-classification/minilm_lora"])
    copied = Path("recipes/text-classification/minilm_lora.yaml")
    assert capsys.readouterr().out == f"lightning-peft fit --config {copied}\n"
    assert yaml.safe_load(copied.read_text())["method"]["class_path"] == "LoRA"
    with pytest.raises(SystemExit, match=r"error: recipes/text-classification/minilm_lora\.yaml exists"):
        main(["recipes", "copy", "text-classification/minilm_lora"])
    main(["recipes", "copy", "recipes/quickstart.yaml", "mine/run.yaml"])
    assert Path("mine/run.yaml").is_file()
    with pytest.raises(SystemExit, match="no recipe named 'quickstrat'; nearest: quickstart"):
        main(["recipes", "copy", "quickstrat"])


def test_a_recipe_is_copied_with_another_method(capsys):
    main(["recipes", "copy", "chat/llama_lora", "--method", "PrefixTuning"])
    copied = Path("recipes/chat/llama_prefix-tuning.yaml")
    assert capsys.readouterr().out == f"lightning-peft fit --config {copied}\n"
    config = yaml.safe_load(copied.read_text())
    assert config["method"]["class_path"] == "PrefixTuning"
    assert config["model"]["init_args"]["lr"] == 1e-3  # five times LoRA's rate, as for the demo model
    assert config["trainer"]["default_root_dir"] == "runs/chat-llama_prefix-tuning"
    assert f"#   lightning-peft fit --config {copied}\n" in copied.read_text()
    with pytest.raises(SystemExit, match="no method named 'prefix'; nearest: lora-prefix"):
        main(["recipes", "copy", "quickstart", "--method", "prefix"])
    with pytest.raises(SystemExit, match=r"error: dora is a method: .* copy quickstart --method dora"):
        main(["recipes", "copy", "dora"])
    with pytest.raises(SystemExit, match="demo_pretrain does not train LoRA"):
        main(["recipes", "copy", "demo_pretrain", "--method", "dora"])


def test_the_explanation_of_a_method_has_an_example(capsys):
    main(["methods", "dora"])
    said = capsys.readouterr().out
    assert "recipes copy quickstart --method dora" in said
    assert "class_path: DoRA" in said
