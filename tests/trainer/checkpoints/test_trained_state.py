"""Injection decides what trains, and checkpoints hold it even if hooks or requires_grad flags change later."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import lightning_peft as lp
from tests.trainer.toys import Toy, loader, lora, same, trainer, val_loader


class FrozenForValidation(Toy):
    def on_validation_epoch_start(self) -> None:
        self.freeze()

    def on_train_epoch_start(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("adapters" in name or name.startswith("head."))


class Toggled(Toy):
    """Freezes parameters that the current optimizer does not step, and never unfreezes them."""

    def on_train_batch_start(self, *_: Any) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("adapters" in name or name.startswith("head."))

    def on_train_batch_end(self, *_: Any) -> None:
        self.requires_grad_(False)


class Teacher(Toy):
    """Updates a moving average of its head, and centres, without gradients."""

    def build(self) -> None:
        super().build()
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.centers = nn.Parameter(torch.zeros(16), requires_grad=False)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.centers.data.lerp_(batch[0].mean(0), 0.1)
        for mean, now in zip(self.teacher.parameters(), self.head.parameters()):
            mean.data.lerp_(now.data, 0.1)


class Scaled(nn.Linear):
    scale = 1.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.scale])

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state[0])


class WithExtraState(Toy):
    def build(self) -> None:
        super().build()
        torch.manual_seed(0)
        self.head = Scaled(self.hparams.width, 2)
        self.beside = Scaled(2, 2)
        self.mean, self.all = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        self.mean.persistent(True)
        self.all.persistent(True)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.head.scale += 1
        self.beside.scale += 2
        self.mean.update(outputs["loss"])
        self.all.update(outputs["loss"])


def state(module: L.LightningModule) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in module.state_dict().items()}


MODULES = [FrozenForValidation, Toggled, Teacher, WithExtraState]


@pytest.mark.parametrize("cls", MODULES)
def test_a_checkpoint_holds_everything_that_changed(tmp_path: Path, cls: type[Toy]) -> None:
    run, module = trainer(tmp_path, method=lora(targets=["body.0", "body.4"]), max_epochs=1), cls()
    run.fit(module, loader(), val_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    back = lp.load_from_checkpoint(cls, tmp_path / "x.ckpt")
    assert same(state(back), state(module))
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert "body.0.weight" not in stored["state_dict"]
    assert stored["lightning_peft"]["methods"][0]["trains"]


@pytest.mark.parametrize("cls", [Teacher, WithExtraState])
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Path, cls: type[Toy]) -> None:
    def fit(epochs: int, **options: Any) -> tuple[L.Trainer, Toy]:
        L.seed_everything(0, verbose=False)
        run, module = trainer(tmp_path, method=lora(targets=["body.0", "body.4"]), max_epochs=epochs), cls()
        run.fit(module, loader(), val_loader(), **options)
        return run, module

    whole = fit(2)[1]
    fit(1)[0].save_checkpoint(tmp_path / "half.ckpt")
    assert same(state(fit(2, ckpt_path=tmp_path / "half.ckpt")[1]), state(whole))


def test_parameters_unfrozen_before_the_fit_are_saved(tmp_path: Path) -> None:
    module = Toy()
    lp.apply(module, lora(trainable=[]))
    module.head.requires_grad_(True)
    module.on_validation_epoch_start = lambda: module.freeze()
    run = trainer(tmp_path, method=lora(trainable=[]), max_epochs=1, num_sanity_val_steps=0)
    run.fit(module, loader(), val_loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert {"head.weight", "head.bias"} <= torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"].keys()


class TrimsInHook(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not k.startswith("body.")}


class TrimsInState(Toy):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith("body.")}


class TrimsLater(Toy):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_step:
            checkpoint["state_dict"].popitem()
        else:
            raise AttributeError("not there yet")


@pytest.mark.parametrize("cls", [TrimsInHook, TrimsInState, TrimsLater])
def test_a_module_that_trims_its_adapters_away_is_refused(tmp_path: Path, cls: type[Toy]) -> None:
    run, module = trainer(tmp_path, max_epochs=1), cls()
    who = f"{cls.__name__}.{'state_dict' if cls is TrimsInState else 'on_save_checkpoint'} leaves"
    with pytest.raises(lp.StateError, match=who):
        run.fit(module, loader())
    assert run.global_step == (5 if cls is TrimsLater else 0)


def test_a_module_that_trims_is_refused_at_an_unplanned_save(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.fit(TrimsInHook(), loader())
    with pytest.raises(lp.StateError, match=r"leaves 4 of 6 trainable tensors .*body\.0\.adapters"):
        run.save_checkpoint(tmp_path / "x.ckpt")


def test_a_file_that_was_trimmed_afterwards_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, method=lora(targets=["body.0", "body.4"]), max_epochs=1)
    run.fit(Teacher(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del stored["state_dict"]["teacher.weight"]  # only the file records that the value changed
    torch.save(stored, tmp_path / "x.ckpt")
    with pytest.raises(lp.StateError, match=r"teacher\.weight"):
        lp.load_from_checkpoint(Teacher, tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": np.float64(8), "dropout": np.float64(0.1)},
        {"seed": np.int64(1), "use_rslora": np.bool_(True)},
        {"targets": [np.str_("body.0")], "name": np.str_("a"), "rank_pattern": {np.str_("body.0"): 2}},
    ],
    ids=str,
)
def test_numpy_scalars_as_options_become_plain_values(tmp_path: Path, options: dict[str, Any]) -> None:
    method = lp.LoRA(**{"r": 2, **options})
    run = trainer(tmp_path, method=method, max_epochs=1, limit_train_batches=1)
    run.fit(Toy(), loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    lp.load_from_checkpoint(Toy, tmp_path / "x.ckpt")
    lp.save_adapter(run.lightning_module, tmp_path / "adapter")
    assert "numpy" not in str({type(v) for v in method.config().values()})


def test_a_second_fold_starts_as_the_first_did(tmp_path: Path) -> None:
    def fold(module: Toy) -> dict[str, Any]:
        L.seed_everything(0, verbose=False)
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, loader())
        return state(module)

    module = Toy()
    initial = copy.deepcopy(module.state_dict())
    first = fold(module)
    with pytest.raises(lp.StateError, match=r"lp\.reset"):
        module.load_state_dict(initial)
    assert same(state(module), first)
    lp.reset(module)
    module.load_state_dict(initial)  # strict, and nothing is left of the first cross-validation fold
    assert same(fold(module), first)


def test_a_strict_state_has_the_head_too(tmp_path: Path) -> None:
    module = Toy()
    initial = {k: v for k, v in module.state_dict().items() if not k.startswith("head.")}
    trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, loader())
    with pytest.raises(lp.StateError, match=r"head\.bias, head\.weight"):
        module.load_state_dict(initial)


class Unfreezes(Toy):
    by_hand = False

    def on_train_epoch_start(self) -> None:
        self.body.requires_grad_(self.current_epoch >= 1)
        if self.by_hand and self.current_epoch == 1:
            self.optimizers().add_param_group({"params": list(self.body.parameters()), "lr": 1e-3})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_parameters_unfrozen_without_an_optimizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"body\.\{0-1,4\}\.weight.* were unfrozen during the fit"):
        trainer(tmp_path, method=lp.LinearProbe()).fit(Unfreezes(), loader())


def test_parameters_unfrozen_and_added_to_the_optimizer_are_saved(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, method=lp.LinearProbe()), Unfreezes()
    module.by_hand = True
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert not torch.equal(module.body[0].weight, Toy().body[0].weight)
    assert same(state(lp.load_from_checkpoint(Unfreezes, tmp_path / "x.ckpt")), state(module))


class LoadsAdapter(Toy):
    """Continues training an adapter that it loads itself."""

    def __init__(self, directory: str = "", hook: str = "init") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.load("init")

    def load(self, hook: str) -> None:
        if hook == self.hparams.hook:
            with suppress(ValueError):  # the hook runs in every stage
                lp.load_adapter(self, self.hparams.directory, trainable=True)

    def setup(self, stage: str) -> None:
        self.load("setup")

    def configure_model(self) -> None:
        self.load("configure_model")


@pytest.mark.parametrize("hook", ["init", "setup", "configure_model"])
def test_an_adapter_that_the_module_loads_gives_trimmed_checkpoints(tmp_path: Path, hook: str) -> None:
    first = Toy()
    lp.apply(first, lp.LoRA(r=2))
    lp.save_adapter(first, tmp_path / "adapter")
    run, module = trainer(tmp_path, method=False, max_epochs=1), LoadsAdapter(str(tmp_path / "adapter"), hook)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == lp.adapter_state(module).keys()
    assert len(stored["state_dict"]) == 4
    assert stored["lightning_peft"]["methods"][0]["trains"]
