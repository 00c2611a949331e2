"""Runs with both of Lightning's packages, ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.core.record import injection_state
from lightning_peft.trainer.packages import lightning_classes

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


def package(name: str) -> ModuleType:
    """Import the package with the submodules that a run uses; skip the test if it is not installed."""
    module = pytest.importorskip(name)
    for part in ("callbacks", "loggers", "strategies"):
        importlib.import_module(f"{name}.{part}")
    return module


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> ModuleType:
    return package(request.param)


def module_of(pl: ModuleType) -> Any:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
                self.head = nn.Linear(8, 2)
            self.calls: list[str] = []

        def forward(self, x):
            return self.head(self.body(x))

        def training_step(self, batch, batch_idx):
            loss = self(batch[0]).pow(2).mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.calls.append("validation")
            self.log("val", self(batch[0]).pow(2).mean())

        def test_step(self, batch, batch_idx):
            self.calls.append("test")

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net


def data() -> DataLoader:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=4)


def trainer_of(pl: ModuleType, root: Path, *callbacks: Any, **options: Any) -> Any:
    options = {"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    return pl.Trainer(default_root_dir=root, accelerator="cpu", callbacks=[*callbacks], **options)


def factors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def by_hand() -> dict[str, torch.Tensor]:
    """The adapters after two epochs of a plain torch loop."""
    module = module_of(package("lightning.pytorch"))()
    lp.apply(module, lp.LoRA(r=2, seed=3))
    optimizer = torch.optim.SGD(lp.trainable_parameters(module), lr=0.1)
    for _ in range(2):
        for (x,) in data():
            optimizer.zero_grad()
            module(x).pow(2).mean().backward()
            optimizer.step()
    return factors(module)


def test_every_stage_runs_the_modules_own_steps(pl: ModuleType, tmp_path: Path):
    module = module_of(pl)()
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="last")
    trainer = trainer_of(pl, tmp_path, lp.LoRA(r=2, seed=3), checkpoint)
    trainer.fit(module, data(), data())
    torch.testing.assert_close(factors(module), by_hand())
    assert isinstance(module, pl.LightningModule)
    module.calls.clear()
    assert trainer.validate(module, data(), verbose=False)[0].keys() == {"val"}
    trainer.test(module, data(), verbose=False)
    assert module.calls == ["validation"] * 2 + ["test"] * 2
    expected = module(torch.cat([x for (x,) in data()]))
    torch.testing.assert_close(torch.cat(trainer.predict(module, data())), expected)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == factors(module).keys()
    loaded = lp.load_from_checkpoint(module_of(pl), tmp_path / "last.ckpt")
    torch.testing.assert_close(loaded(torch.ones(1, 4)), module(torch.ones(1, 4)))


def test_resuming_goes_on(pl: ModuleType, tmp_path: Path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="first")
    trainer_of(pl, tmp_path, lp.LoRA(r=2, seed=3), checkpoint, max_epochs=1).fit(module_of(pl)(), data())
    module = module_of(pl)()
    trainer_of(pl, tmp_path, lp.LoRA(r=2, seed=3)).fit(module, data(), ckpt_path=tmp_path / "first.ckpt")
    torch.testing.assert_close(factors(module), by_hand())


def test_averaging_keeps_the_trainable_state_only(pl: ModuleType, tmp_path: Path):
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="last")
    module = module_of(pl)()
    trainer_of(pl, tmp_path, lp.LoRA(r=2, seed=3), averaging, checkpoint).fit(module, data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == factors(module).keys()
    with pytest.raises(Exception, match="StochasticWeightAveraging is not supported"):
        trainer_of(pl, tmp_path, lp.LoRA(r=2), pl.callbacks.StochasticWeightAveraging(1e-2)).fit(
            module_of(pl)(), data()
        )


def test_class_checks_recognise_both_packages(pl: ModuleType):
    for path in (
        "LightningModule",
        "callbacks.WeightAveraging",
        "callbacks.StochasticWeightAveraging",
        "loggers.WandbLogger",
        "strategies.DDPStrategy",
        "strategies.ModelParallelStrategy",
        "strategies.launchers.multiprocessing._MultiProcessingLauncher",
    ):
        *parents, name = path.split(".")
        assert getattr(importlib.import_module(".".join([pl.__name__, *parents])), name) in lightning_classes(path)


def test_a_release_without_a_class_is_not_an_error():
    assert lightning_classes("callbacks.NoSuchCallback") == ()


@pytest.mark.parametrize("what", ["callback", "logger", "strategy"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_that_mixes_both_packages_is_refused_before_anything_changes(name: str, what: str, tmp_path: Path):
    pl, other = package(name), package(next(n for n in PACKAGES if n != name))
    module = module_of(pl)()
    trainer = trainer_of(pl, tmp_path, lp.LoRA(r=2))
    if what == "callback":
        trainer.callbacks.append(other.callbacks.ModelCheckpoint(tmp_path))
    elif what == "logger":
        trainer.loggers = [other.loggers.CSVLogger(tmp_path)]
    else:
        trainer.strategy.precision_plugin = other.plugins.precision.Precision()
    cls = type(module)
    with pytest.raises(Exception, match=r"do not recognise each other's classes.*import them from"):
        trainer.fit(module, data())
    assert type(module) is cls
    assert injection_state(module) is None
    assert all(p.requires_grad for p in module.parameters())
