"""A save that is killed at any moment leaves the old adapter or checkpoint, or the new one, whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightning_peft as lp
from benchmarks.faults import at_file_operation, kill_here
from lightning_peft.formats.directory.files import adapter_folders, read_files
from lightning_peft.formats.directory.replace import CONFIG, WEIGHTS, _locked, complete_replacement
from lightning_peft.trainer.checkpoints.sharded_folder import META, check_files, recover_path, save_folder
from tests.models import MLP

STRATEGY = SimpleNamespace(is_global_zero=True, barrier=lambda: None)


def adapted(value: float) -> MLP:
    model = MLP()
    lp.apply(model, lp.LoRA(r=2))
    with torch.no_grad():
        for parameter in lp.trainable_parameters(model):
            parameter.fill_(value)
    return model


def save_adapter(value: float, folder: Path) -> None:
    lp.save_adapter(adapted(value), folder)


def read_adapter(folder: Path) -> set[float]:
    assert adapter_folders(folder.parent) == [folder]
    return {float(x) for tensor in read_files(folder).tensors.values() for x in tensor.flatten()}


def save_shards(value: float, folder: Path) -> None:
    save_folder(STRATEGY, {"state_dict": lp.adapter_state(adapted(value)), "value": value}, folder)


def read_shards(folder: Path) -> set[float]:
    recover_path(STRATEGY, folder)
    meta = torch.load(folder / META, weights_only=True)
    check_files(folder, meta)
    state = lp.adapter_state(adapted(0.0))
    dcp.load({"state_dict": state}, checkpoint_id=folder)
    return {meta["value"], *(float(x) for tensor in state.values() for x in tensor.flatten())}


def killed(folder: Path, number: int, save: Callable[[float, Path], None], value: float) -> bool:
    """Whether a process that saves was killed before its ``number``-th file operation; False if it ended before."""
    if (child := os.fork()) == 0:
        try:
            at_file_operation(folder.parent, number, kill_here)
            save(value, folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status <= 0, "the save failed"
    return status < 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("save", "read"), [(save_adapter, read_adapter), (save_shards, read_shards)])
def test_a_kill_at_any_moment(save: Callable, read: Callable, tmp_path: Path) -> None:
    folder, seen = tmp_path.resolve() / "adapters" / "x", []
    save(1.0, folder)
    for number in itertools.count(1):
        if not killed(folder, number, save, 2.0):
            break
        seen.append(read(folder))
        assert seen[-1] in ({1.0}, {2.0}), number
        save(1.0, folder)
    assert {1.0} in seen
    assert {2.0} in seen
    assert read(folder) == {2.0}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("save", "read"), [(save_adapter, read_adapter), (save_shards, read_shards)])
def test_a_second_kill_before_anything_was_read(save: Callable, read: Callable, tmp_path: Path) -> None:
    folder = tmp_path.resolve() / "adapters" / "x"
    for number in itertools.count(1):
        save(1.0, folder)
        if not killed(folder, number, save, 2.0):
            break
        assert killed(folder, 3, save, 3.0)
        assert read(folder) in ({1.0}, {2.0}), number


def test_a_replacement_that_still_runs_is_left_alone(tmp_path: Path) -> None:
    save_adapter(1.0, tmp_path / "x")
    beside = tmp_path / "x" / ".x.0"
    (beside / "old").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "x" / name).rename(beside / name)
    with _locked(beside):
        complete_replacement(tmp_path / "x")
        with pytest.raises(lp.FormatError, match=f"has no {CONFIG}"):
            read_files(tmp_path / "x")
    assert read_adapter(tmp_path / "x") == {1.0}
    assert not beside.exists()
