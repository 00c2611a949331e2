"""If the disk is full during a save, the error is clear and the earlier file is unchanged, for every kind of file."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

import lightning_peft as lp
from lightning_peft.cli.merge import write_plain
from lightning_peft.core.state.atomic_file import new_file, save_torch_file
from lightning_peft.trainer.checkpoints.sharded_folder import save_folder
from tests.trainer.toys import Toy, lora, trainer


@contextmanager
def full_disk(limit: int = 3000) -> Iterator[None]:
    """Limit the size of this process's files: writing more raises an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder, hidden ones and those of its subfolders included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def attached() -> Toy:
    module = Toy(width=64)
    lp.apply(module, lora())
    return module


def save_checkpoint(folder: Path, **options: Any) -> None:
    run = trainer(folder, method=lora(), enable_checkpointing=False, max_steps=1, **options)
    run.fit(Toy(width=64))
    run.save_checkpoint(folder / "run.ckpt")


def merge(folder: Path, name: str) -> None:
    model = attached()
    lp.unload(model, merge=True)
    (folder / name).unlink(missing_ok=True)
    write_plain(model, folder / name)


def save_shards(folder: Path) -> None:
    strategy = SimpleNamespace(is_global_zero=True, barrier=lambda: None)
    save_folder(strategy, {"state_dict": lp.adapter_state(attached())}, folder / "run.shards")


SAVES: dict[str, Callable[[Path], None]] = {
    "checkpoint": save_checkpoint,
    "adapter in an old folder": lambda folder: lp.save_adapter(attached(), folder),
    "adapter in a new folder": lambda folder: lp.save_adapter(attached(), folder / "new"),
    "merged, .pt": lambda folder: merge(folder, "merged.pt"),
    "merged, .safetensors": lambda folder: merge(folder, "merged.safetensors"),
    "sharded checkpoint": save_shards,
    "torch file": lambda folder: save_torch_file(torch.zeros(2000), folder / "run.ckpt"),
}


@pytest.mark.parametrize("what", SAVES)
def test_a_full_disk_leaves_the_earlier_files(tmp_path: Path, what: str) -> None:
    if what != "adapter in a new folder":
        lp.save_adapter(attached(), tmp_path)
    save_torch_file({"earlier": torch.ones(2)}, tmp_path / "run.ckpt")
    if what == "sharded checkpoint":
        save_shards(tmp_path)
    before = contents(tmp_path)
    with full_disk(), pytest.raises(OSError, match="the earlier content is unchanged; free disk space") as caught:
        SAVES[what](tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before
    SAVES[what](tmp_path)  # with space again


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_may_not_be_written(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save_torch_file({"earlier": torch.ones(2)}, tmp_path / "run.ckpt")
    before = contents(tmp_path)
    makes, opens = Path.mkdir, Path.open

    def refuse(path: Path, mode: str = "r", *args: object, **options: object) -> object:
        if "w" in mode:
            raise OSError(number, os.strerror(number), str(path))
        return opens(path, mode, *args, **options)

    def mkdir(path: Path, *args: object, **options: object) -> None:
        if path.exists():
            return makes(path, *args, **options)
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    for save in ("torch file", "adapter in an old folder", "adapter in a new folder", "sharded checkpoint"):
        with pytest.raises(OSError, match=r"nothing was saved, and .*; choose another folder") as caught:
            SAVES[save](tmp_path)
        assert caught.value.errno == number
    assert contents(tmp_path) == before


def test_a_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for killed in range(2):
        save_torch_file({"good": killed}, path)
        if (child := os.fork()) == 0:
            with new_file(path) as temporary:
                temporary.write_bytes(path.read_bytes()[:100])
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert torch.load(path) == {"good": killed}
        assert len(contents(tmp_path)) == 2  # at most one temporary file is left, even after several kills
    save_torch_file({"good": 2}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()], [AsyncCheckpointIO(TorchCheckpointIO())]])
def test_a_trainer_never_copies_over_a_checkpoint(tmp_path: Path, plugins: Any, monkeypatch: Any) -> None:
    """Lightning moves the file from the folder for temporary files, which copies if that is another file system."""
    monkeypatch.setattr("tempfile.mkstemp", lambda: pytest.fail("a temporary file elsewhere"))
    save_checkpoint(tmp_path, plugins=plugins)
    for plugin in plugins:
        plugin.teardown()
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["global_step"] == 1


def test_errors_of_other_kinds_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="lambda"):
        save_torch_file(lambda: 0, tmp_path / "x.pt")
    assert not contents(tmp_path)
