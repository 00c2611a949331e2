"""``ModelCheckpoint`` in every mode, with a method of each kind: the right files, each with the state of its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

import lightning_peft as lp
from tests.trainer.test_other_callbacks import METHODS, Module, start
from tests.trainer.toys import same

EPOCHS = 3  #: each has three steps


class Record(Callback):
    """Records the trained parameters after each step and the validation loss after each epoch, as plain tensors."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}
        self.losses: list[float] = []
        self.fail_at = fail_at

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        trained = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        self.states[trainer.global_step] = trained
        if trainer.global_step == self.fail_at:
            raise ValueError("a batch fails")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))


def best(losses: list[float], number: int, worst: bool = False) -> list[int]:
    """The steps of the epochs with the lowest losses; an epoch has three steps."""
    return [3 * (epoch + 1) for epoch in sorted(range(len(losses)), key=losses.__getitem__, reverse=worst)[:number]]


@dataclass
class Mode:
    """One way to save.

    Attributes:
        save: makes the callback; the names of its files begin with the step.
        steps: the steps of the files that must be there, from the validation losses.
        fail_at: the step at which the run fails.
        last: the step of ``last.ckpt``.
    """

    save: Callable[[Path], Callback]
    steps: Callable[[list[float]], list[int]]
    fail_at: int | None = None
    last: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def keep(**options: Any) -> Callable[[Path], Callback]:
    return lambda folder: ModelCheckpoint(folder, "{step}", **options)


MODES: dict[str, Mode] = {
    "default": Mode(keep(), lambda losses: [9]),
    "the two best": Mode(keep(monitor="val_loss", save_top_k=2), lambda losses: best(losses, 2)),
    "the worst": Mode(keep(monitor="val_loss", mode="max"), lambda losses: best(losses, 1, worst=True)),
    "none": Mode(keep(save_top_k=0), lambda losses: []),
    "every two steps": Mode(keep(every_n_train_steps=2, save_top_k=-1), lambda losses: [2, 4, 6, 8]),
    "every two epochs": Mode(keep(every_n_epochs=2, save_top_k=-1), lambda losses: [6]),
    "after training epochs": Mode(keep(save_on_train_epoch_end=True, save_top_k=-1), lambda losses: [3, 6, 9]),
    "by time": Mode(keep(train_time_interval=timedelta(0), save_top_k=-1), lambda losses: list(range(1, 10))),
    "weights only": Mode(keep(save_weights_only=True, save_top_k=-1), lambda losses: [3, 6, 9]),
    "last, a copy": Mode(keep(save_last=True, monitor="val_loss"), lambda losses: best(losses, 1), last=9),
    "last, a link": Mode(keep(save_last="link", save_top_k=-1), lambda losses: [3, 6, 9], last=9),
    "on an exception": Mode(
        keep(every_n_epochs=9, save_on_exception=True, save_last=True), lambda losses: [4], fail_at=4, last=4
    ),
    "OnExceptionCheckpoint": Mode(lambda folder: OnExceptionCheckpoint(folder, "step=4"), lambda losses: [4], 4),
}


def saved(name: str, method: str, folder: Path) -> tuple[Record, Any, Module]:
    """A run that saves into ``folder``."""
    mode, record = MODES[name], Record(MODES[name].fail_at)
    run = start(folder, method, mode.save(folder), "last", max_epochs=EPOCHS, enable_checkpointing=True)
    run.trainer.callbacks.insert(0, record)  # before the callback saves
    if mode.fail_at is None:
        run.trainer.fit(run.module)
    else:
        with pytest.raises(ValueError, match="a batch fails"):
            run.trainer.fit(run.module)
    return record, run.callback, run.module


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODES)
def test_the_files_hold_the_state_of_their_step(name: str, method: str, tmp_path: Path) -> None:
    record, callback, module = saved(name, method, tmp_path)
    mode, files = MODES[name], {path.stem: path for path in tmp_path.glob("*.ckpt")}
    steps = mode.steps(record.losses)
    assert files.keys() == {*(f"step={step}" for step in steps), *(["last"] if mode.last else [])}
    assert (tmp_path / "last.ckpt").is_symlink() == (name == "last, a link")
    if getattr(callback, "monitor", None):
        assert Path(callback.best_model_path).stem == f"step={steps[0]}"
        assert float(callback.best_model_score) == record.losses[steps[0] // 3 - 1]
    for stem, path in files.items():
        state = torch.load(path, weights_only=True)
        step = mode.last if stem == "last" else int(stem.removeprefix("step="))
        assert state["global_step"] == step
        assert ("optimizer_states" in state) == (name != "weights only")
        trained = record.states[step]
        assert all(torch.equal(state["state_dict"][key], value) for key, value in trained.items())
        assert (
            state["state_dict"].keys() == lp.adapter_state(module).keys()
        )  # this checkpoint also holds further state of the adapters
        loaded = lp.load_from_checkpoint(Module, path)
        assert all(torch.equal(loaded.get_parameter(key), value) for key, value in trained.items())


@pytest.fixture(scope="module", params=METHODS)
def whole(request: Any, tmp_path_factory: Any) -> tuple[str, dict[int, dict[str, Tensor]]]:
    """A method, and the states of a run that was never stopped."""
    return request.param, saved("none", request.param, tmp_path_factory.mktemp("whole"))[0].states


@pytest.mark.parametrize("name", ["every two steps", "on an exception"])
def test_a_run_continues_from_what_was_saved(whole: Any, name: str, tmp_path: Path) -> None:
    method, states = whole
    saved(name, method, tmp_path)
    path = tmp_path / ("last.ckpt" if MODES[name].last == 4 else "step=2.ckpt")
    again = Record()
    run = start(tmp_path, method, again, "first", max_epochs=EPOCHS)
    run.trainer.fit(run.module, ckpt_path=path)
    first = torch.load(path, weights_only=True)["global_step"] + 1
    assert again.states.keys() == set(range(first, 3 * EPOCHS + 1))
    assert same(again.states, {step: states[step] for step in again.states})


class Noted(Callback):
    """A user's callback that keeps a note in checkpoints."""

    def __init__(self, note: str = "") -> None:
        self.note = note

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["a note"] = self.note

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.note = checkpoint["a note"]


@pytest.mark.parametrize("how", ["first", "last"])
@pytest.mark.parametrize("method", METHODS)
def test_a_users_own_entries_are_kept(method: str, how: str, tmp_path: Path) -> None:
    run = start(tmp_path, method, Noted("written"), how, max_epochs=1)
    run.trainer.fit(run.module)
    run.trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = start(tmp_path, method, Noted(), how, max_epochs=1)
    again.trainer.fit(again.module, ckpt_path=tmp_path / "x.ckpt")
    assert again.callback.note == "written"
