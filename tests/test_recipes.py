"""Every recipe in recipes/ runs, is bound to the signatures of its classes, and names its own command."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_peft.cli.main import main

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, monkeypatch):
    main(["fit", f"--config={recipe}", "--trainer.fast_dev_run=2"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_states_its_command(recipe):
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any(f"lightning-peft fit --config recipes/{recipe.name}" in line for line in header)
