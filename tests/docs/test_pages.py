"""The Python of README.md and of every page of docs/ runs from top to bottom as it is written."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from tests.methods.tiny import llama

ROOT = Path(__file__).parents[2]
INCLUDED = re.compile(r'--8<-- "(docs/examples/.*\.py)"')


class MyOwnModule(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = llama().model
        self.classifier = nn.Linear(32, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.body(input_ids=input_ids).last_hidden_state[:, -1])

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class WithRate(MyOwnModule):
    def __init__(self, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        ids = torch.randint(1, 100, (8, 4), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(ids, ids[:, 0] % 2), 4)

    test_dataloader = train_dataloader


def blocks(page: str) -> list[str]:
    """The Python blocks of a page in order, including those inside tabs."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def written(page: str) -> list[str]:
    """The blocks that the page itself contains; the others include files of docs/examples, which are tested
    elsewhere."""
    return [block for block in blocks(page) if not INCLUDED.search(block)]


def run(code: list[str], names: dict[str, Any]) -> None:
    """Run blocks one after another; a statement whose comment names an error has to raise it.

    A block that defines a method of a module is called with ``model`` and ``batch`` from ``names``.
    """
    for block in code:
        lines = block.splitlines()
        for statement in ast.parse(block).body:
            said = re.search(r"# (\w+Error)\b", "\n".join(lines[statement.lineno - 1 : statement.end_lineno]))
            with pytest.raises(getattr(lp, said[1])) if said else nullcontext():
                exec(compile(ast.Module([statement], []), "page", "exec"), names)
        if method := re.match(r"def (\w+)\(self, batch, batch_idx\)", block):
            names[method[1]](names["model"], names["batch"], 0)


def save(folder: str, method: lp.PEFTMethod, make: Callable[[], nn.Module] = MyOwnModule) -> None:
    module = make()
    lp.apply(module, method)
    with torch.no_grad():
        for parameter in lp.trainable_parameters(module):
            parameter.normal_(std=0.1)
    lp.save_adapter(module, folder)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Every Trainer is quiet and stops after an epoch."""
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer
    monkeypatch.setattr(L, "Trainer", lambda **given: trainer(**{**options, **given, "max_epochs": 1}))


def ids(rows: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(1, 100, (rows, 4))}


def of_index() -> dict[str, Any]:
    return {"MyModule": MyOwnModule, "MyData": Data}


def of_adapters() -> dict[str, Any]:
    for name in ("summaries", "questions"):
        save(f"runs/{name}", lp.LoRA(r=2))
    model = MyOwnModule()
    lp.apply(model, lp.LoRA(r=2))
    return {"model": model, "other": MyOwnModule()}


def of_many() -> dict[str, Any]:
    save("runs/german", lp.LoRA(r=2, targets=["v_proj"]))
    return {"model": MyOwnModule().eval(), "batch": next(iter(Data().train_dataloader()))}


def of_methods() -> dict[str, Any]:
    model = MyOwnModule()
    lp.apply(model, lp.LoRA(r=2), lp.PrefixTuning(2, name="prefix"))
    return {"model": model}


def of_own_module() -> dict[str, Any]:
    return {"MyModule": MyOwnModule, "MyData": Data, "batch": ids(2)["input_ids"]}


def of_rows() -> dict[str, Any]:
    model = llama()
    lp.apply(model, lp.LoRA(r=2, name="legal"), lp.LoRA(r=2, name="medical"))
    batch = {**ids(2), "adapters": ["legal", None]}
    return {"model": model, "batch_of_three": ids(3), "batch_of_four": ids(4), "batch": batch}


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/index.md": of_index,
    "docs/adapters.md": of_adapters,
    "docs/many.md": of_many,
    "docs/methods.md": of_methods,
    "docs/own_module.md": of_own_module,
    "docs/deploy.md": dict,
    "docs/new_method.md": dict,
    "docs/quantised.md": dict,
    "docs/rows.md": of_rows,
    "docs/frozen_cache.md": dict,
    "docs/train_together.md": lambda: {"MyOwnModule": WithRate, "datamodule": Data()},
    "docs/strategies.md": dict,
    "docs/logging.md": of_index,
}


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    run(written(page), {"L": L, "lp": lp, **PAGES[page]()})


def test_every_page_is_run_and_every_included_file_has_a_test():
    pages = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))]
    assert {page for page in pages if written(page)} == PAGES.keys() | {"docs/own_texts.md", "docs/chat.md"}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    included = [found[1] for page in ["README.md", *pages] for found in map(INCLUDED.search, blocks(page)) if found]
    assert included
    for file in included:
        assert f'"{re.sub("_(before|after)$", "", Path(file).stem)}' in tests, f"{file}: no test in tests/docs runs it"


def test_readme():
    names = {"L": L, "lp": lp, "MyOwnModule": MyOwnModule, "module": MyOwnModule(), "datamodule": Data()}
    first, own, adapters = blocks("README.md")
    run([first], dict(names))
    fit, loaded, rest = own.partition("module = lp.load_from_checkpoint")
    run([fit], names)
    names["trainer"].save_checkpoint("best.ckpt")
    run([loaded + rest], names)

    save("questions", lp.DoRA(r=4, targets=["q_proj"], trainable=["classifier"]))
    names |= {"model": MyOwnModule().eval(), "batch_of_three": ids(3)}
    run([adapters], names)
    assert names["logits"].shape == (3, 2)
