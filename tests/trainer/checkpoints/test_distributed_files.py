"""Distributed checkpoints written by torch are read; hostile ones are refused without running their code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import lightning_peft as lp
from lightning_peft.trainer.checkpoints.distributed_files import PlainPlanner, check_metadata
from lightning_peft.trainer.checkpoints.folder_reader import read_folder
from lightning_peft.trainer.checkpoints.optimizer_names import in_order, optimizer_by_name
from lightning_peft.trainer.checkpoints.sharded_folder import FILES, check_files, save_folder
from tests.trainer.toys import Toy, loader, same, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Payload:
    def __init__(self, run=os.mkdir, argument="ran"):
        self.run, self.argument = run, argument

    def __reduce__(self):
        return self.run, (self.argument,)


def saved(**more: object) -> tuple[Path, dict[str, object]]:
    """Save a distributed checkpoint; return its folder and the saved state."""
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}
    dcp.save(state, checkpoint_id="folder")
    return Path("folder"), state


def test_checkpoints_written_by_torch_are_read():
    folder, state = saved()
    check_metadata(folder)
    zeros = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    options = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=1.0).state_dict()
    dcp.load({"model": zeros, "optimizer": options}, checkpoint_id=folder, planner=PlainPlanner())
    assert all(torch.equal(zeros[k], v) for k, v in state["model"].items())
    assert options["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("run", [os.mkdir, eval, torch.load, pickle.loads])
def test_metadata_that_would_run_code(run):
    folder, _ = saved()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(run)))
    with pytest.raises(lp.StateError, match=r"was not read: reading it would run"):
        check_metadata(folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "os", "dataclass"])
def test_names_that_torch_modules_import_are_not_reachable(name):
    """Pickle protocol 4 can name attributes of attributes ("os.mkdir")."""
    folder, _ = saved()
    parts = [b"\x80\x04"]
    module = b"torch.distributed.checkpoint.filesystem"
    parts += [b"\x8c" + bytes([len(module)]) + module, b"\x8c" + bytes([len(name)]) + name.encode(), b"\x93"]
    parts += [b"\x8c\x03ran\x85R."]
    (folder / ".metadata").write_bytes(b"".join(parts))
    with pytest.raises(lp.StateError, match=rf"would run .*\.{name}$"):
        check_metadata(folder)
    assert not Path("ran").exists()


def test_a_value_that_would_run_code():
    folder, _ = saved(extra=Payload())
    check_metadata(folder)
    assert not Path("ran").exists()
    with pytest.raises(CheckpointException, match="'extra' in the checkpoint is not a plain value"):
        dcp.load({"extra": 0}, checkpoint_id=folder, planner=PlainPlanner())
    assert not Path("ran").exists()


def test_files_outside_the_folder_and_damaged_files():
    folder, _ = saved()
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(lp.StateError, match=r"names files outside its folder: .*secret"):
        check_metadata(folder)
    (folder / ".metadata").write_bytes(b"nothing")
    with pytest.raises(lp.StateError, match="cannot be read"):
        check_metadata(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(lp.StateError, match="is not a distributed checkpoint"):
        check_metadata(folder)


@pytest.mark.parametrize("files", ["x", 3, ["x"], {3: "x"}])
def test_a_damaged_list_of_files(files: object):
    with pytest.raises(lp.StateError, match=r"folder/meta\.pt is damaged"):
        check_files(Path("folder"), {FILES: files})


def sharded(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of half a run as one file, and as the folder that a strategy with shards writes."""
    module, run = Toy(), trainer(tmp_path, enable_checkpointing=False, max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    checkpoint["optimizer_states"] = [optimizer_by_name(run.optimizers[0], module)]
    alone = SimpleNamespace(is_global_zero=True, barrier=lambda: None)
    save_folder(alone, checkpoint, tmp_path / "half.shards")
    return tmp_path / "half.ckpt", tmp_path / "half.shards"


class Reordered(Toy):
    def configure_optimizers(self) -> Any:
        optimizers, schedules = super().configure_optimizers()
        optimizers[0].param_groups[0]["params"].reverse()
        return optimizers, schedules


def test_a_sharded_checkpoint_on_one_device(tmp_path: Path) -> None:
    file, folder = sharded(tmp_path)
    states = []
    for path, module in ((file, Toy()), (folder, Toy()), (folder, Reordered())):
        trainer(tmp_path, enable_checkpointing=False, max_epochs=2).fit(module, loader(), ckpt_path=path)
        states.append(module.state_dict())
    assert same(states[0], states[1])
    assert same(states[0], states[2])  # the folder names the parameters of the optimizer
    assert same(*(lp.load_from_checkpoint(Toy, path).state_dict() for path in (file, folder)))


class TwoGroups(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        *first, last = self.parameters()
        return torch.optim.AdamW([{"params": first}, {"params": [last]}], lr=0.1)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    _, folder = sharded(tmp_path)
    with pytest.raises(lp.StateError, match=r"no parameter group with body"):
        trainer(tmp_path, max_epochs=2).fit(TwoGroups(), loader(), ckpt_path=folder)
    saved()
    with pytest.raises(lp.StateError, match=r"folder is a folder, but not a sharded checkpoint .* it has no meta\.pt"):
        lp.load_from_checkpoint(Toy, Path("folder"))
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(lp.StateError, match=r"__0_0\.distcp has changed since it was saved"):
        lp.load_from_checkpoint(Toy, folder)


def test_damaged_metadata(tmp_path: Path) -> None:
    """Memory is allocated only for tensors that the files can hold, and the error names the folder."""
    _, folder = sharded(tmp_path)
    meta = torch.load(folder / "meta.pt", weights_only=True)
    torch.save({**meta, FILES: {}}, folder / "meta.pt")
    whole = (folder / ".metadata").read_bytes()
    huge = "lists tensors that are larger than its files"
    for size, reason in (([1 << 40], huge), ([1 << 32, 1 << 32], huge), ([-1], r"state_dict\.head\.weight a negative")):
        metadata = pickle.loads(whole)
        metadata.state_dict_metadata["state_dict.head.weight"].size = torch.Size(size)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(lp.StateError, match=reason):
            lp.load_from_checkpoint(Toy, folder)
    for path in (("optimizer", "state", "x", "step"), (0, "state", "x", "step"), ("optimizer_0", "state", 1, "step")):
        metadata = pickle.loads(whole)
        key = next(k for k in metadata.planner_data if k.startswith("optimizer_0.state"))
        metadata.planner_data[key] = path
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(
            lp.StateError, match=r"half\.shards is damaged: its \.metadata does not say what 'optimizer"
        ):
            read_folder(folder)


def test_optimizer_states_of_another_form_are_left() -> None:
    """Optimizers that wrap another one may have a state without parameter groups."""
    module, state = Toy(), {"inner": {}}
    assert in_order(state, torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1), module) is state
