"""Checkpointing, and saved tensors that are kept elsewhere, give the same gradients as a plain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from tests.helpers import close
from tests.methods import tiny
from tests.trainer.test_other_callbacks import METHODS
from tests.trainer.toys import trainer

#: what the module does with the tensors that its graph saves
SAVED = {
    "on the CPU": lambda: save_on_cpu(),
    "packed in float64": lambda: saved_tensors_hooks(
        lambda t: (t.double() if t.is_floating_point() else t, t.dtype), lambda packed: packed[0].to(packed[1])
    ),
}


class Checkpointed(tiny.Classifier):
    """A user's module that checkpoints each of its blocks, whose embedding is frozen."""

    how = "plain"

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.how == "reentrant, with inputs that require gradients":
            x.requires_grad_()
        for block in self.body:
            x = block(x) if "reentrant" not in self.how else checkpoint(block, x, use_reentrant="not" not in self.how)
        return self.head(x.mean(1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.how not in SAVED:
            return super().training_step(batch, index)
        with SAVED[self.how]():
            return super().training_step(batch, index)


class HuggingFace(L.LightningModule):
    """A transformers model that checkpoints its layers."""

    how = "plain"

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.model = make()
        torch.manual_seed(0)
        self.head = nn.Linear(32, 3)

    def on_fit_start(self) -> None:
        self.model.train()  # transformers checkpoints in training mode only; dropout is drawn again in backward
        if self.how != "plain":
            self.model.activation_checkpointing_enable({"use_reentrant": self.how == "reentrant"})

    def training_step(self, batch: Any, index: int) -> Tensor:
        hidden = self.model(input_ids=batch[0], output_hidden_states=True).hidden_states[-1]
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    train_dataloader = tiny.Classifier.train_dataloader


def trained(module: L.LightningModule, method: lp.PEFTMethod, how: str, folder: Path) -> dict[str, Tensor]:
    """The gradients of the first step, and the trainable state after the last one."""
    gradients: dict[str, Tensor] = {}

    class Record(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for name, parameter in pl_module.named_parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    gradients.setdefault(f"gradient of {name}", parameter.grad.clone())

    module.how = how
    L.seed_everything(1, verbose=False)
    trainer(folder, Record(), method=method, max_epochs=1, enable_checkpointing=False).fit(module)
    return {**gradients, **lp.adapter_state(module)}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close(found[key], value, 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [*SAVED, "not reentrant", "reentrant, with inputs that require gradients"])
def test_a_users_module(how: str, method: str, tmp_path: Path) -> None:
    expected = trained(Checkpointed(), METHODS[method](), "plain", tmp_path)
    equal(trained(Checkpointed(), METHODS[method](), how, tmp_path), expected)


@pytest.mark.parametrize("method", METHODS)
def test_lost_gradients_are_an_error(method: str, tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match="use_reentrant"):
        trained(Checkpointed(), METHODS[method](), "reentrant", tmp_path)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(tiny.llama, ["q_proj", "v_proj"]), (tiny.gpt2, ["c_attn"]), (tiny.bert, ["query", "value"])],
)
def test_models_of_transformers(make: Any, targets: list[str], tmp_path: Path) -> None:
    plain, *others = (
        trained(HuggingFace(make), lp.LoRA(r=2, targets=targets, trainable=["head"]), how, tmp_path)
        for how in ("plain", "not reentrant", "reentrant")
    )
    for other in others:
        equal(other, plain)
