"""The Python of README.md and docs/many.md runs from top to bottom as it is written."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from tests.methods.tiny import llama

ROOT = Path(__file__).parents[2]


class MyOwnModule(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = llama().model
        self.classifier = nn.Linear(32, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(input_ids=input_ids).last_hidden_state[:, -1])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        ids = torch.randint(1, 100, (8, 4), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(ids, ids[:, 0] % 2), 4)

    test_dataloader = train_dataloader


def blocks(page: str) -> list[str]:
    """The Python blocks of a page; methods of a module are left out, since they run in no module here."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found if not block.startswith("def ")]


def save(folder: str, method: lp.PEFTMethod) -> None:
    module = MyOwnModule()
    lp.apply(module, method)
    with torch.no_grad():
        for parameter in lp.trainable_parameters(module):
            parameter.normal_(std=0.1)
    lp.save_adapter(module, folder)


def run(code: list[str], names: dict[str, object]) -> None:
    for block in code:
        exec(compile(block, "page", "exec"), names)


def test_readme(monkeypatch):
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **given: trainer(**{**options, **given, "max_epochs": 1}))
    names = {"L": L, "lp": lp, "MyOwnModule": MyOwnModule, "module": MyOwnModule(), "datamodule": Data()}
    first, own, adapters = blocks("README.md")
    run([first], dict(names))
    fit, loaded, rest = own.partition("module = lp.load_from_checkpoint")
    run([fit], names)
    names["trainer"].save_checkpoint("best.ckpt")
    run([loaded + rest], names)

    save("questions", lp.DoRA(r=4, targets=["q_proj"], trainable=["classifier"]))
    names |= {"model": MyOwnModule().eval(), "batch_of_three": {"input_ids": torch.ones(3, 4, dtype=torch.long)}}
    run([adapters], names)
    assert names["logits"].shape == (3, 2)


def test_many_adapters():
    save("runs/german", lp.LoRA(r=2, targets=["v_proj"]))
    model = MyOwnModule().eval()
    run(blocks("docs/many.md"), {"lp": lp, "model": model})
    assert not any("adapters" in key for key in model.state_dict())
    assert type(model.body.layers[0].self_attn.q_proj) is nn.Linear
