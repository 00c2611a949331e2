"""Models of other packages train, checkpoint, reload, merge and unload with a method of each family."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.helpers import assert_same_bits, bits, close, differ, trained_parameters
from tests.integration.packages import probe
from tests.integration.packages.case import MERGED, METHODS, Case
from tests.integration.packages.page import ROOT, page, versions
from tests.integration.packages.table import CASES


def fit(case: Case, module: Any, method: lp.PEFTMethod, folder: Path) -> Path:
    """Train three steps; return the checkpoint's path."""
    trainer = case.pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=3,
        logger=False,
        callbacks=[method, case.pl.callbacks.ModelCheckpoint(folder, filename="last")],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module.train(), case.loader())
    return folder / "last.ckpt"


def classes(module: nn.Module) -> list[type]:
    return [type(part) for part in module.modules()]


def installed(package: str) -> str:
    """The installed release of ``package``; the test is skipped if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_model(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]
    installed(case.package)
    base, module = case.module(), case.module()
    before_classes = classes(module)
    if method in case.refused:
        with pytest.raises(lp.TargetError, match=case.refused[method]):
            lp.apply(module, case.method(method))
        return
    before, untrained = bits(base), case.output(base)
    path = fit(case, module, case.method(method), tmp_path)
    trained = case.output(module)
    differ(trained, untrained)

    # The checkpoint holds only the trainable state, and the frozen base is unchanged.
    stored = torch.load(path, weights_only=case.plain_hyperparameters)["state_dict"]
    trains = trained_parameters(module).keys()
    frozen = {k for k, _ in base.named_parameters(remove_duplicate=False)} - trains
    assert trains <= stored.keys()
    assert not stored.keys() & frozen
    assert_same_bits(bits(module, frozen), {k: before[k] for k in frozen})
    close(case.output(case.load(path)), trained)

    if method in MERGED:
        lp.merge(module)
        close(case.output(module), trained, 1e-4)
        lp.unmerge(module)
    lp.unload(module)
    assert classes(module) == before_classes
    assert_same_bits(bits(module, frozen), {k: before[k] for k in frozen})
    assert module.state_dict().keys() == before.keys()


def test_the_page_is_made_from_the_table() -> None:
    text = (ROOT / "docs/packages.md").read_text()
    assert text == page(), "python -m tests.integration.packages.page > docs/packages.md"


@pytest.mark.parametrize("package", sorted({case.package for case in CASES.values()}))
def test_the_page_names_the_release_that_is_tested(package: str) -> None:
    known = versions("packages_by_hand.txt") | versions("packages.txt")
    assert installed(package) == known[package], "update .ci/packages.txt and write the page again"


def test_all_linear_includes_every_linear_layer_of_these_packages() -> None:
    for package in probe.PACKAGES:
        installed(package)
    text = (ROOT / "docs/linear_layers.md").read_text()
    assert text == probe.page(), "python -m tests.integration.packages.probe > docs/linear_layers.md"
    for package in probe.PACKAGES:
        layers, _ = probe.probe(package)
        assert not [layer.name for layer in layers if layer.linear and not layer.included]
        several = [layer.name for layer in layers if layer.included and not layer.linear]
        assert all(name.startswith(("RNN", "LSTM", "GRU", "MultiheadAttention")) for name in several)
