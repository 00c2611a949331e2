"""The commands that need no torch: what they print, and that they import nothing heavy."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    for path in RECIPES.rglob("*.yaml"):
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
