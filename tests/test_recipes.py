"""Every recipe in recipes/ runs, is bound to the signatures of its classes, and names its own command."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lightning_peft.cli.main import main
from lightning_peft.cli.methods import command_name, exported
from tests.methods.tiny import vit

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def _vision() -> None:
    """The files that the image recipe needs: a pretrained model and images."""
    vit().save_pretrained("vit")
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for name in ("train.npz", "val.npz"):
        np.savez(name, images=images, labels=np.arange(20) % 10)


PREPARE = {"visual-prompt-tuning": _vision}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, monkeypatch):
    PREPARE.get(recipe.stem, lambda: None)()
    main(["fit", f"--config={recipe}", "--trainer.fast_dev_run=2"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_states_its_command(recipe):
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"lightning-peft fit --config recipes/{recipe.name}" in line for line in header)


@pytest.mark.parametrize("method", exported(), ids=command_name)
def test_every_method_has_a_recipe_of_its_name(method):
    (recipe,) = [path for path in RECIPES if path.stem == command_name(method)]
    assert re.search(rf"(class_path|method): {method.__name__}\b", recipe.read_text())
