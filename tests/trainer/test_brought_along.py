"""Modules that already have adapters in a submodule, in a Trainer without methods."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_peft as lp
from tests.trainer.toys import Toy, loader, same, trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the entry points that pyproject.toml declares, even if the package is not installed."""
    declared = re.findall(
        r'^\[project\.entry-points\."(.+)"\]\n(\w+) = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    folder = tmp_path / "site" / "lightning_peft-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning_peft\nVersion: 0\n")
    (folder / "entry_points.txt").write_text("".join(f"[{g}]\n{name} = {value}\n" for g, name, value in declared))
    monkeypatch.syspath_prepend(folder.parent)


installed = pytest.mark.usefixtures("_installed")


class AdaptsPart(Toy):
    """Loads an adapter onto its body in one of the hooks."""

    def __init__(self, directory: str = "", hook: str = "init") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.put("init")

    def put(self, hook: str) -> None:
        if hook == self.hparams.hook and not any("adapters" in name for name, _ in self.named_modules()):
            if self.hparams.directory:
                lp.load_adapter(self.body, self.hparams.directory, trainable=True)
            else:
                lp.apply(self.body, lora())

    def setup(self, stage: str) -> None:
        self.put("setup")

    def configure_model(self) -> None:
        self.put("configure_model")


def lora() -> lp.LoRA:
    return lp.LoRA(r=2, targets=["0", "4"], seed=0)


def adapter(folder: Path) -> str:
    part = Toy().body
    lp.apply(part, lora())
    lp.save_adapter(part, folder)
    return str(folder)


def state(module: nn.Module) -> dict[str, Any]:
    return {k: v.clone() for k, v in module.state_dict().items()}


LORA_AND_HEAD = {f"body.{i}.adapters.default.{f}" for i in (0, 4) for f in ("lora_A", "lora_B")} | {
    "head.weight",
    "head.bias",
}


@installed
@pytest.mark.parametrize("loads", [True, False], ids=["load_adapter", "apply"])
@pytest.mark.parametrize("hook", ["init", "setup", "configure_model"])
def test_checkpoints_hold_the_trainable_state_and_resume(tmp_path: Path, hook: str, loads: bool) -> None:
    directory = adapter(tmp_path / "adapter") if loads else ""
    whole = AdaptsPart(directory, hook)
    L.seed_everything(1)
    trainer(tmp_path / "whole", method=False, max_epochs=2).fit(whole, loader())

    run, half = trainer(tmp_path / "half", method=False, max_epochs=1), AdaptsPart(directory, hook)
    L.seed_everything(1)
    run.fit(half, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == LORA_AND_HEAD
    assert stored["lightning_peft"]["methods"][0]["trains"]
    assert not torch.equal(half.head.weight, Toy().head.weight)

    resumed = AdaptsPart(directory, hook)
    L.seed_everything(2)
    trainer(tmp_path / "rest", method=False, max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(state(resumed), state(whole))
    assert same(state(lp.load_from_checkpoint(AdaptsPart, tmp_path / "half.ckpt")), state(half))


@installed
@pytest.mark.parametrize("hook", ["init", "setup"])
def test_a_fresh_trainer_tests_such_a_checkpoint(tmp_path: Path, hook: str) -> None:
    run, module = trainer(tmp_path, method=False, max_epochs=1), AdaptsPart("", hook)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    before = run.test(module, loader(), verbose=False)
    fresh = trainer(tmp_path, method=False)
    assert fresh.test(AdaptsPart("", hook), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False) == before


class Wraps(L.LightningModule):
    """Holds a list of networks that were adapted before."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.stack([network(batch[0]).square().mean() for network in self.networks]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@installed
def test_a_network_that_was_adapted_before_it_was_wrapped(tmp_path: Path) -> None:
    network = Toy().body
    lp.load_adapter(network, adapter(tmp_path / "adapter"), trainable=True)
    run = trainer(tmp_path, method=False, max_epochs=1)
    run.fit(Wraps(network), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert len(stored["state_dict"]) == 4
    assert "lightning_peft" in stored


@installed
def test_a_trainer_of_the_other_package_finds_the_adapter_too(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    module_class = type("Other", (pl.LightningModule,), {k: v for k, v in vars(Wraps).items() if k != "__init__"})
    network, module = Toy().body, module_class()
    lp.apply(network, lora())
    module.networks = nn.ModuleList([network])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert "lightning_peft" in torch.load(tmp_path / "x.ckpt", weights_only=True)


@installed
def test_submodules_that_were_adapted_separately_are_refused(tmp_path: Path) -> None:
    networks = [Toy().body, Toy().body]
    for network in networks:
        lp.apply(network, lora())
    with pytest.raises(MisconfigurationException, match=r"'networks\.0' and 'networks\.1' .* adapted separately"):
        trainer(tmp_path, method=False).fit(Wraps(*networks), loader())


@installed
def test_a_module_without_adapters_stays_as_it_is(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, method=False, max_epochs=1), Toy()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert type(module) is Toy
    assert "_peft_adapted" not in vars(run.strategy)
    assert "lightning_peft" not in torch.load(tmp_path / "x.ckpt", weights_only=True)


@installed
def test_frozen_adapters_do_not_change_a_run_without_methods(tmp_path: Path) -> None:
    network = Toy().body
    lp.load_adapter(network, adapter(tmp_path / "adapter"))
    module = Wraps(network, nn.Linear(16, 2))
    trainer(tmp_path, method=False, max_epochs=1).fit(module, loader())
    assert type(module) is Wraps


def test_a_package_that_is_not_installed_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.trainer.brought_along.entry_points", lambda group: [])
    directory = adapter(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="is not installed, so a Trainer cannot find this adapter"):
        lp.load_adapter(Toy().body, directory, trainable=True)
