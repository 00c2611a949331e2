"""Runs in which adapters would not train as they do alone are refused by ``TrainTogether``."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_peft as lp
from tests.trainer.test_train_together import Model, fit, loader, lora


def changed(module: nn.Module) -> Model:
    """A model with one more module between its layers."""
    model = Model()
    model.base.encoder.layer.extend([Layer(module.double()), copy.deepcopy(model.base.encoder.layer[0])])
    return model


class Layer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(x)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Closure(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: changed(nn.Dropout(0.1)), "the dropout 'base.encoder.layer.1.inner' is active"),
        (lambda: changed(Noise()), "training_step draws random numbers"),
        (lambda: changed(Norm()), "the batch norm 'base.encoder.layer.1.inner.norm' is in training mode"),
        (lambda: changed(Centred()), "rows of the batch influence one another"),
        (lambda: changed(Counter()), "changes the buffer 'base.encoder.layer.1.inner.seen'"),
        (Manual, "manual optimization is not supported"),
        (Closure, "LBFGS calls training_step several times"),
    ],
)
def test_modules_that_would_not_train_as_alone_are_refused_before_the_first_step(make: Any, why: str) -> None:
    model = make()
    first = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(MisconfigurationException, match=f"TrainTogether: .*{why}"):
        fit(model, lora("a", targets="all-linear"), lora("b"), lp.TrainTogether())
    trained = [p for n, p in model.named_parameters() if n.endswith("lora_B")]
    # Adapters that start at zero have equal rows of equal data in the first step, so a mean over them is the same.
    assert not any(p.any() for p in trained) or why.startswith("rows")
    assert all(torch.equal(p, first[n]) for n, p in model.named_parameters() if n in first)


STOP = EarlyStopping("val_loss")


@pytest.mark.parametrize(
    ("callbacks", "options", "why"),
    [
        (lambda: [lora("a"), lp.TrainTogether()], {}, "at least two methods"),
        (lambda: [lora("a"), lora("b"), lp.TrainTogether({"c": {}})], {}, r"hparams names \['c'\]"),
        (lambda: [lora("a"), lora("b"), lp.TrainTogether({"a": {"rate": 1}})], {}, "hparams names 'rate'"),
        (lambda: [lora("a"), lora("b", dropout=0.1), lp.TrainTogether()], {}, "draws random numbers"),
        (lambda: [lora("a"), lp.GradualUnfreezing(name="b"), lp.TrainTogether()], {}, "GradualUnfreezing unfreezes"),
        (lambda: [lora("a"), lora("b"), lp.CacheFrozen(), lp.TrainTogether()], {}, "CacheFrozen is not supported"),
        (
            lambda: [lora("a"), lp.AdaLoRA(name="b"), lp.TrainTogether(early_stopping=STOP)],
            {},
            "early_stopping is not supported for 'b': AdaLoRA",
        ),
        (
            lambda: [lora("a"), lora("b"), lp.TrainTogether()],
            {"strategy": "ddp", "devices": 1},
            "DDPStrategy is not supported",
        ),
        (
            lambda: [lora("a"), lora("b"), lp.TrainTogether()],
            {"loaders": {"a": loader(), "b": loader(rows=12)}},
            r"different numbers of batches: \{'a': 2, 'b': 3\}",
        ),
    ],
)
def test_runs_that_would_not_be_those_of_each_adapter_are_refused(callbacks: Any, options: Any, why: str) -> None:
    model = Model()
    with pytest.raises(MisconfigurationException, match=f"TrainTogether: .*{why}"):
        fit(model, *callbacks(), **options)
    assert "_peft_together" not in vars(model)


def test_many_steps_run_inside_one_another() -> None:
    """At 24 adapters, the nested steps need more frames than Python's limit."""
    model, names, limit = Model(), [f"m{i}" for i in range(24)], sys.getrecursionlimit()
    fit(model, *(lora(name) for name in names), lp.TrainTogether(), max_steps=1, epochs=1)
    for name in names:
        moved = [p for n, p in model.named_parameters() if f".{name}.lora_B" in n]
        assert moved
        assert all(p.any() for p in moved)
    assert sys.getrecursionlimit() == limit
