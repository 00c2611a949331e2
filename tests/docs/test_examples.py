"""The three toy methods of docs/examples, as a user outside the package would have written them."""

from __future__ import annotations

import runpy
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
METHODS = {"toy_weight": "RowScale", "toy_activation": "Shift", "toy_selection": "Smallest"}


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> DataLoader:
    x = torch.randn(16, 4, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x[:, 0, 0] > 0).long()), 8)


@pytest.mark.parametrize("example", METHODS)
def test_example(example, tmp_path):
    source = EXAMPLES / f"{example}.py"
    assert len(source.read_text().splitlines()) < 40
    method = runpy.run_path(str(source))[METHODS[example]](trainable=["head"])
    module, x = Module(), torch.randn(2, 4, 16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    base = module.eval()(x)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[method],
    )
    trainer.fit(module.train(), data(), data())

    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert state.keys() == lp.adapter_state(module).keys()
    frozen = before.keys() - state.keys()
    assert frozen
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in frozen)
    assert not torch.allclose(module.eval()(x), base)
    loaded = lp.load_from_checkpoint(Module, trainer.checkpoint_callback.best_model_path)
    assert torch.equal(loaded.eval()(x), module(x))


def test_the_weight_example_merges(tmp_path):
    method = runpy.run_path(str(EXAMPLES / "toy_weight.py"))["RowScale"]()
    module, x = Module().eval(), torch.randn(2, 4, 16)
    lp.apply(module, method)
    with torch.no_grad():
        for parameter in lp.trainable_parameters(module):
            parameter.normal_(std=0.1)
    adapted = module(x)
    lp.merge(module)
    torch.testing.assert_close(module(x), adapted, rtol=1e-5, atol=1e-5)
