"""The toy methods of docs/examples, as a user writes them outside the package."""

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
METHODS = {
    "toy_weight": "RowScale",
    "toy_low_rank": "TwoFactors",
    "lora_xs": "LoRAXS",
    "toy_activation": "Shift",
    "toy_selection": "Smallest",
}


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


@pytest.fixture(params=["toy_weight", "toy_low_rank", "lora_xs"])
def two(request):
    """A module with two adapters of a toy weight method, "a" and "b", and an input for it."""
    make = runpy.run_path(str(EXAMPLES / f"{request.param}.py"))[METHODS[request.param]]
    module = Module().eval()
    lp.apply(module, make(name="a"), make(name="b", targets=["linear1"]))
    with torch.no_grad():
        for parameter in lp.trainable_parameters(module):
            parameter.normal_(std=0.1)
    return module, torch.randn(3, 4, 16)


def alone(module: nn.Module, *names: str, x: torch.Tensor) -> torch.Tensor:
    with lp.active(module, *names):
        return module(x)


def test_a_weight_example_merges(two):
    module, x = two
    adapted = module(x)
    lp.merge(module)
    torch.testing.assert_close(module(x), adapted, rtol=1e-5, atol=1e-5)
    lp.unmerge(module)
    assert torch.equal(module(x), adapted)


def test_a_weight_example_serves_rows(two):
    module, x = two
    expected = [alone(module, *names, x=row[None]) for names, row in zip((["a"], ["b"], []), x)]
    with lp.rows(module, ["a", "b", None]):
        torch.testing.assert_close(module(x), torch.cat(expected))


def test_a_weight_example_is_combined_and_becomes_a_lora(two):
    module, x = two
    a = alone(module, "a", x=x)
    assert lp.combine(module, ["a", "b"], weights=[1.0, 0.0], name="mix").error < 1e-5
    torch.testing.assert_close(alone(module, "mix", x=x), a, rtol=1e-4, atol=1e-5)
    assert lp.to_lora(module, "a").error < 1e-5
    torch.testing.assert_close(alone(module, "a", x=x), a, rtol=1e-4, atol=1e-5)


def test_a_weight_example_is_saved_and_loaded(two, tmp_path):
    module, x = two
    lp.save_adapter(module, tmp_path)
    again = Module().eval()
    assert lp.load_adapter(again, tmp_path) == ["a", "b"]
    for name in ("a", "b"):
        torch.testing.assert_close(alone(again, name, x=x), alone(module, name, x=x))


@pytest.mark.parametrize("example", ["toy_activation", "toy_selection"])
def test_the_other_examples_are_saved_loaded_and_serve_rows(example, tmp_path):
    make = runpy.run_path(str(EXAMPLES / f"{example}.py"))[METHODS[example]]
    module, x = Module().eval(), torch.randn(2, 4, 16)
    lp.apply(module, make(name="a"))
    with torch.no_grad():
        for parameter in lp.trainable_parameters(module):
            parameter.normal_(std=0.1)
    lp.save_adapter(module, tmp_path)
    again = Module().eval()
    base = again(x)
    lp.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), module(x))
    with lp.rows(again, ["a", None]):
        torch.testing.assert_close(again(x), torch.stack([module(x)[0], base[1]]))


def test_the_low_rank_example_needs_no_svd_and_one_run_for_all_rows(two, request, monkeypatch):
    module, x = two
    low_rank = request.node.callspec.params["two"] != "toy_weight"
    runs, forward = [], nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, *args: (runs.append(self), forward(self, *args))[1])
    with lp.rows(module, ["a", "b", None]):
        module(x)
    assert runs.count(module.body.layers[0].linear1) == (1 if low_rank else 3)
    if low_rank:
        report = lp.combine(module, ["a", "b"], how="cat")
        assert report.error == 0
        assert set(report.ranks.values()) == {4, 8}
    else:
        with pytest.raises(ValueError, match="how='cat' needs low-rank adapters"):
            lp.combine(module, ["a", "b"], how="cat")
