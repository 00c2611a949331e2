"""Losses that do not depend on trainable parameters, and sparse gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_peft as lp
from tests.helpers import close

from .toys import Toy, loader, lora, trainer


class Reentrant(Toy):
    """Runs all layers in one region of reentrant gradient checkpointing whose input does not require a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.head(self.body(x)), x, use_reentrant=True)


def test_a_loss_that_reentrant_checkpointing_cut_off(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"does not depend on any trainable parameter.*Set use_reentrant=False"):
        trainer(tmp_path, method=lora(), max_epochs=1).fit(Reentrant(), loader())


class Looks(L.LightningModule):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8, sparse=sparse)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embed(ids).mean(1)))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


SPARSE = {
    "full": lambda: lp.FullFineTuning(),
    "trainable": lambda: lp.LoRA(r=2, targets=["layer"], trainable=["embed"]),
    "lora": lambda: lp.LoRA(r=2, targets=["embed"]),
    "loha": lambda: lp.LoHa(r=2, targets=["embed"]),
    "lokr": lambda: lp.LoKr(r=2, targets=["embed"]),
    "oft": lambda: lp.OFT(block_size=2, targets=["embed"]),
    "tokens": lambda: lp.LoRA(r=2, targets=["layer"], trainable_tokens={"embed": [1, 2]}),
}


@pytest.mark.parametrize("method", SPARSE)
def test_sparse_embeddings_train_as_dense_ones(method: str, tmp_path: Path) -> None:
    batches = DataLoader(torch.randint(0, 10, (6, 4), generator=torch.Generator().manual_seed(0)), batch_size=2)
    trained = []
    for sparse in (True, False):
        module = Looks(sparse)
        trainer(tmp_path, method=SPARSE[method](), max_epochs=2, enable_checkpointing=False).fit(module, batches)
        trained.append(lp.adapter_state(module))
    assert trained[0].keys() == trained[1].keys()
    for key, value in trained[0].items():
        close(value, trained[1][key])
