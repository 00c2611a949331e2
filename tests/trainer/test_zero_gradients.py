"""Gradients of exactly zero over the first steps are reported, except zeros with a legitimate reason."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.trainer.zero_gradients import ZeroGradientAudit, _largest
from tests.helpers import adapted
from tests.kinds import Kind
from tests.methods.tiny import llama
from tests.table import Row, over_table

from .toys import Toy, loader, lora, trainer

IDS = torch.arange(4, 20).view(2, 8)


class Language(Toy):
    """A causal model with a next-token loss."""

    def build(self) -> None:
        self.net = llama()

    def loss(self, batch: Any) -> Tensor:
        return self.net(IDS, labels=IDS).loss


def fit(root: Path, module: Toy, method: Any, **options: Any) -> list[str]:
    """Train for a few steps; return the warnings about gradients."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(root, method=method, enable_checkpointing=False, **{"max_steps": 5, "max_epochs": -1, **options})
        run.fit(module, loader())
    return [str(w.message) for w in caught if "gradient" in str(w.message)]


def prompt(position: str, **options: Any) -> lp.PromptTuning:
    return lp.PromptTuning(4, position=position, init="random", **options)


def test_a_suffix_prompt_of_a_causal_model(tmp_path: Path) -> None:
    said = r"adapter 'default' was exactly zero in each of the first 4 .* All trainable gradients .* position='prefix'"
    with pytest.raises(lp.AuditError, match=said):
        fit(tmp_path, Language(), prompt("suffix"))
    assert len(fit(tmp_path, Language(), prompt("suffix", audit="warn"), max_steps=9)) == 1
    assert fit(tmp_path, Language(), prompt("suffix", audit="off")) == []
    assert fit(tmp_path, Language(), prompt("prefix")) == []
    assert fit(tmp_path, Language(), prompt("suffix"), max_steps=3) == []  # too short to be checked


def test_a_zero_gradient_next_to_a_head_that_learns(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"adapter 'default' was exactly zero.*learns nothing\. Place"):
        fit(tmp_path, Language(), prompt("suffix", trainable=["lm_head"]))


class Ignored(Toy):
    """The loss ignores one of two heads."""

    def build(self) -> None:
        self.other = nn.Linear(16, 2)
        super().build()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden) + 0 * self.other(hidden)


def test_trained_modules(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"gradient of module 'other' was exactly zero"):
        fit(tmp_path, Ignored(), lora(trainable=["head", "other"]))
    with pytest.raises(lp.AuditError, match=r"parameters trained by LinearProbe 'default' was exactly zero"):
        fit(tmp_path, Ignored(), lp.LinearProbe(targets=["other"]))


def steps(model: nn.Module, loss: Any, count: int = 4, lr: float = 0.1) -> ZeroGradientAudit:
    """Run the audit over some steps of plain SGD."""
    audit = ZeroGradientAudit(model)
    optimizer = torch.optim.SGD(lp.trainable_parameters(model), lr=lr)
    for step in range(count):
        optimizer.zero_grad()
        loss(step).backward()
        audit.step(optimizer)
        optimizer.step()
    return audit


@over_table("training", kinds=["llama", "vit"])
def test_every_method_of_the_table_changes_the_output(row: Row, kind: Kind) -> None:
    model = adapted(row, kind, moved=False)
    assert steps(model, lambda step: model(*kind.batch(step)).square().mean()).groups == []


def test_a_head_of_zeros_during_a_warmup() -> None:
    model = Toy().train()
    nn.init.zeros_(model.head.weight)
    lp.apply(model, lora())
    x = torch.randn(8, 16)
    audit = steps(model, lambda step: model(x)[:, 0].sum(), lr=0.0)
    assert len(audit.groups) == 2  # not checked
    assert steps(model, lambda step: model(x)[:, 0].sum()).groups == []


def test_inactive_adapters_are_not_checked() -> None:
    model = llama()
    lp.apply(model, lp.LoRA(r=2, name="a"), lp.LoRA(r=2, name="b", targets=["q_proj"]))
    lp.set_active(model, "a")
    for parameter in model.parameters():
        parameter.grad = (
            torch.zeros_like(parameter) if parameter.requires_grad else None
        )  # as zero_grad(set_to_none=False) leaves it
    audit = ZeroGradientAudit(model)
    optimizer = torch.optim.SGD(lp.trainable_parameters(model), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        model(IDS, labels=IDS).loss.backward()
        audit.step(optimizer)
        optimizer.step()
    assert [group.adapter for group in audit.groups] == ["b"]


def test_tokens_that_occur_in_no_batch() -> None:
    model = llama()
    lp.apply(model, lp.LoRA(r=2, targets=["q_proj"], trainable_tokens=[90, 91]))
    (group,) = ZeroGradientAudit(model).groups
    assert not any(".rows" in name for name, p in model.named_parameters() if any(p is q for q in group.parameters))
    assert steps(model, lambda step: model(IDS, labels=IDS).loss).groups == []


class Overflows(Ignored):
    """Its loss overflows half precision in the first three steps."""

    steps = 0

    def loss(self, batch: Any) -> Tensor:
        self.steps += 1
        return super().loss(batch) * (float("inf") if self.steps <= 3 else 1.0)


def test_steps_that_a_scaler_skips_do_not_count(tmp_path: Path) -> None:
    def run(max_steps: int) -> list[str]:
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
        method = lora(trainable=["head", "other"])
        return fit(tmp_path, Overflows(), method, plugins=[plugin], max_steps=max_steps)

    assert run(6) == []
    with pytest.raises(lp.AuditError, match=r"module 'other' was exactly zero"):
        run(8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_the_largest_gradient_is_that_of_the_infinite_norm(dtype: torch.dtype) -> None:
    gradients = [torch.randn(3, 4).to(dtype), torch.randn(2, 5).to(dtype), torch.empty(0, dtype=dtype)]
    expected = torch.nn.utils.get_total_norm(gradients[:2], math.inf).float()
    torch.testing.assert_close(_largest(gradients), expected)
    assert _largest([g * 0 for g in gradients]) == 0
    assert _largest(gradients[2:]) == 0
    assert _largest([1e-30 * torch.ones(2)]) > 0  # whose square is 0 in float32
    assert _largest([]).isnan()
    assert not _largest([*gradients, torch.tensor([math.inf])]).isfinite()
