"""Write the folder of a sharded checkpoint in one step, and detect files that changed since.

torch writes over the files of an existing folder, so that a kill in the middle of a save would leave files of two
checkpoints with the same names and shapes.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from lightning_peft.core.state.atomic_file import recover_folder, replace_folder, save_torch_file, writing
from lightning_peft.core.state.digest import LENGTH
from lightning_peft.core.state.state_dict import StateError

__all__ = ["FILES", "META", "check_files", "recover_path", "save_folder"]

META = "meta.pt"  #: the file for everything that is not sharded
FILES = "lightning_peft_files"  #: its key for the digests of the other files


def save_folder(strategy: Any, checkpoint: dict[str, Any], path: Path) -> None:
    """Write a distributed checkpoint beside ``path`` and move it there when it is complete; a collective.

    ``meta.pt`` gets digests of the other files. Without them, a file of another checkpoint with the same shapes, or a
    changed byte, would be read without an error.

    Raises:
        OSError: if rank 0 cannot write the folder; ``path`` is unchanged.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    state = {"state_dict": checkpoint.pop("state_dict")}
    state |= {f"optimizer_{i}": saved for i, saved in enumerate(checkpoint.pop("optimizer_states", []))}
    new = _new_folder(path)
    with writing(path):
        if strategy.is_global_zero:
            recover_folder(new, path)  # after a kill during a replacement, ``new`` is the only copy
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        strategy.barrier()
        try:
            dcp.save(state, checkpoint_id=new)
            if strategy.is_global_zero:
                checkpoint[FILES] = {file.name: _file_digest(file) for file in sorted(new.iterdir())}
                save_torch_file(checkpoint, new / META)
        except BaseException as error:
            if strategy.is_global_zero:
                shutil.rmtree(new, ignore_errors=True)  # a full disk needs the space
            if isinstance(error, CheckpointException):  # torch collects the errors of all ranks in this BaseException
                raise next(iter(error.failures.values()))[0] from error
            raise
        if strategy.is_global_zero:
            replace_folder(new, path)
    strategy.barrier()


def recover_path(strategy: Any, path: Path) -> None:
    """Finish a :func:`save_folder` that was killed while it replaced ``path``; a collective."""
    if strategy.is_global_zero:
        recover_folder(_new_folder(path), path)
    strategy.barrier()


def check_files(path: Path, metadata: dict[str, Any]) -> None:
    """Compare the files of a distributed checkpoint with the digests in its ``meta.pt``, if there are any.

    Raises:
        StateError: if a file is missing or has changed; the message names it.
    """
    digests = metadata.get(FILES, {})
    if not isinstance(digests, dict) or not all(isinstance(name, str) for name in digests):
        raise StateError(f"{path / META} is damaged: its list of files is not a table of names. Use another copy")
    for name, digest in digests.items():
        file = path / Path(name).name
        if not file.is_file() or _file_digest(file) != digest:
            raise StateError(
                f"{file} {'has changed since it was saved' if file.is_file() else 'is missing'}: the checkpoint is "
                "damaged, or mixed with another one. Use another copy"
            )


def _new_folder(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:LENGTH]
