"""Every recipe runs with its own method, and the quick start with every other method of recipes/methods.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.cli.main import main
from lightning_peft.cli.methods import command_name, exported
from lightning_peft_command import main as command
from lightning_peft_command.settings import read_settings
from tests.methods.tiny import vit
from tests.tasks.test_folders import images

ROOT = Path(__file__).parents[1] / "recipes"
SETTINGS = read_settings()


@pytest.mark.parametrize("name", ["quickstart", "demo_pretrain"])
def test_recipe_runs_and_states_its_command(name):
    recipe = ROOT / f"{name}.yaml"
    assert f"#   lightning-peft fit --config recipes/{recipe.name}\n" in recipe.read_text()
    main(["fit", f"--config={recipe}", "--trainer.fast_dev_run=2"])


@pytest.mark.parametrize("method", SETTINGS)
def test_method_runs(method):
    flags = []
    recipe = "quickstart"
    if method == "visual-prompt-tuning":
        recipe = "images/vit_lora"
        images("photos", 3)
        vit().save_pretrained("vit")
        flags = ["--model.network_args={pretrained_model_name_or_path: vit}", "--data.size=16"]
    command(["recipes", "copy", recipe, "run.yaml", "--method", method])
    main(["fit", "--config=run.yaml", "--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", *flags])


@pytest.mark.parametrize("method", exported(), ids=lambda method: method.__name__)
def test_every_method_has_settings_of_its_name(method):
    assert f": {method.__name__}\n" in SETTINGS[command_name(method)].method
