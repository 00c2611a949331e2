"""Frozen adapters next to the one that trains do not change the training, its checkpoints or its result."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

import lightning_peft as lp
from lightning_peft.core.injection.apply import install
from lightning_peft.core.injection.overrides import override_trained
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.switching.active import deactivate
from lightning_peft.trainer.audit import AuditError, audit_active
from tests.helpers import perturb

from .toys import Toy, every_step, loader, lora, same, state_of, trainer, val_loader


def add_frozen(module: L.LightningModule, name: str = "b") -> None:
    """Add a frozen, inactive adapter with its own head, as loading one does."""
    method = lp.LoRA(r=2, name=name, trainable=["head"])
    plan = method.plan(module)
    override_trained(plan, module, {"head.weight": torch.ones(2, 16), "head.bias": torch.zeros(2)})
    for adapter in (a.adapter for a in plan.attach):
        adapter.requires_grad_(False)
    others = injection_state(module) is not None
    install(module, {name: (method, plan)})
    perturb(module, name=name)
    if others:
        deactivate(module, name)


class Adds(Callback):
    """Adds a frozen adapter at one hook of a fit."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def act(self, moment: str, module: L.LightningModule) -> None:
        if moment == self.moment and "b" not in injection_state(module).methods:
            add_frozen(module)

    def on_fit_start(self, trainer, module) -> None:
        self.act("fit", module)

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.act(f"batch {trainer.global_step}", module)

    def on_validation_start(self, trainer, module) -> None:
        self.act("validation", module)


class Compares(Toy):
    """Evaluates another adapter during validation."""

    def validation_step(self, batch: Any, index: int) -> None:
        names = set(injection_state(self).methods)
        with lp.disabled(self):
            self.log("base", self.loss(batch))
        if "b" in names:
            with lp.active(self, "b"):
                self.log("other", self.loss(batch))
        super().validation_step(batch, index)


def fit(root: Path, moment: str | None, *callbacks: Callback, ckpt: Path | None = None, kind: Any = Compares) -> Any:
    L.seed_everything(3 if ckpt is None else 99, verbose=False)
    module = kind()
    added = [Adds(moment)] if moment else []
    run = trainer(
        root, *added, *callbacks, enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks)
    )
    if moment == "before":
        lp.apply(module, lora(name="default"))
        add_frozen(module)
    run.fit(module, loader(), val_loader(), ckpt_path=ckpt)
    return module, run


def trained(result: Any) -> dict[str, Any]:
    state = state_of(*result)
    weights = {k: v for k, v in state["weights"].items() if ".adapters.b." not in k}
    return {**state, "weights": weights}


@pytest.mark.parametrize("moment", ["before", "fit", "batch 0", "batch 3", "validation"])
def test_a_frozen_adapter_does_not_change_a_training(tmp_path: Path, moment: str) -> None:
    module, run = fit(tmp_path, moment)
    assert same(trained((module, run)), trained(fit(tmp_path, None)))
    assert not any(".adapters.b." in n for n, p in module.named_parameters() if p.requires_grad)
    report = injection_state(module).report
    assert report.trainable == sum(p.numel() for p in lp.trainable_parameters(module))
    with lp.active(module, "b"):
        x, own = torch.randn(3, 16), module.head.adapters["b"]
        assert torch.equal(module.head(x), torch.nn.functional.linear(x, own.weight, own.bias))


def test_an_average_continues_after_resume(tmp_path: Path) -> None:
    results = [trained(fit(tmp_path, moment, EMAWeightAveraging(decay=0.5))) for moment in (None, "batch 3")]
    assert same(*results)


@pytest.mark.parametrize("moment", ["before", "fit", "batch 3"])
def test_resume_is_exact_with_and_without_the_frozen_one(tmp_path: Path, moment: str) -> None:
    expected = trained(fit(tmp_path, moment, *every_step(tmp_path)))
    for step in (2, 6):
        path = tmp_path / f"step={step}.ckpt"
        assert same(trained(fit(tmp_path, moment, ckpt=path)), expected)
        assert same(trained(fit(tmp_path, None, ckpt=path)), expected)
    plain = trained(fit(tmp_path / "plain", None, *every_step(tmp_path / "plain")))
    assert same(trained(fit(tmp_path, "before", ckpt=tmp_path / "plain" / "step=2.ckpt")), plain)


def test_a_missing_trained_method_is_an_error(tmp_path: Path) -> None:
    fit(tmp_path, "before", *every_step(tmp_path))
    with pytest.raises(StateError, match="the checkpoint holds a LoRA named 'default', but this run attaches only"):
        trainer(tmp_path, method=lora(name="other")).fit(Compares(), loader(), ckpt_path=tmp_path / "step=2.ckpt")


def test_a_checkpoint_alone_gives_both_back(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, "batch 3", *every_step(tmp_path))
    again = lp.load_from_checkpoint(Compares, tmp_path / "step=10.ckpt")
    x = torch.randn(3, 16)
    for names in (("default",), ("b",), ("default", "b")):
        with lp.active(module, *names), lp.active(again, *names):
            assert torch.equal(module.eval()(x), again.eval()(x))
    assert torch.equal(module.eval()(x), again.eval()(x))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in module.named_parameters() if p.requires_grad
    ]


def test_a_checkpoint_alone_gives_what_was_combined_back(tmp_path: Path) -> None:
    module = Compares()
    lp.apply(module, lora(name="default"))
    add_frozen(module)
    bias = lp.BitFit(name="c")
    plan = bias.plan(module)
    override_trained(plan, module, {name: torch.ones_like(module.get_parameter(name)) for name in plan.train})
    install(module, {"c": (bias, plan)})
    lp.combine(module, ["b", "c"], name="lora_and_copies")
    lp.combine(module, ["c"], [0.5], name="copies")
    assert isinstance(injection_state(module).methods["copies"], lp.BitFit)
    lp.set_active(module, "default")
    trainer(tmp_path, *every_step(tmp_path)).fit(module, loader(), val_loader())
    again, x = lp.load_from_checkpoint(Compares, tmp_path / "step=10.ckpt"), torch.randn(3, 16)
    outputs = {}
    for name in ("default", "b", "c", "lora_and_copies", "copies"):
        with lp.active(module, name), lp.active(again, name):
            outputs[name] = module.eval()(x)
            assert torch.equal(outputs[name], again.eval()(x))
    assert not torch.equal(outputs["copies"], outputs["c"])
    with pytest.raises(ValueError, match="'c' does not change a matrix, so it cannot be converted to LoRA"):
        lp.to_lora(module, "c")


class Deletes(Callback):
    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if trainer.global_step == 3:
            lp.delete_adapter(module, self.name)


def test_only_the_frozen_adapter_can_be_deleted_during_training(tmp_path: Path) -> None:
    module, run = fit(tmp_path, "fit", Deletes("b"))
    assert same(trained((module, run)), trained(fit(tmp_path, None)))
    assert list(injection_state(module).methods) == ["default"]
    with pytest.raises(ValueError, match="'default' is in training, and the optimizer holds its parameters"):
        fit(tmp_path, None, Deletes("default"))
    module, _ = fit(tmp_path, None)
    lp.delete_adapter(module, "default")  # after the fit
    assert not any("adapters" in name for name in module.state_dict())


def test_inactive_trainable_adapters_cause_a_warning_before_the_first_step() -> None:
    module = Toy()
    lp.apply(module, lora(name="default"), lora(name="b"))
    lp.set_active(module, "default")
    with pytest.warns(UserWarning, match=r"\['b'\] are trainable but inactive"):
        audit_active(module)
    add_frozen(module, "c")  # inactive too, but not trainable
    lp.set_active(module, "default", "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit_active(module)


class Idle(Toy):
    def on_train_start(self) -> None:
        lp.set_active(self)


def test_inactive_trainable_adapters_are_named(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match=r"got no gradient.*: their adapters are not active \(lp.set_active\)"):
        fit(tmp_path, None, kind=Idle)
