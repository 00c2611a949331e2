"""Read a sharded checkpoint (a folder) as one file: without a process group, on any number of devices."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_peft.core.names import canonical, listed
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.trainer.checkpoints.distributed_files import PlainPlanner, check_metadata
from lightning_peft.trainer.checkpoints.sharded_folder import META, check_files

_MODULE = "state_dict."

__all__ = ["read_folder"]


def read_folder(path: Path, weights_only: bool = True, optimizers: bool = True) -> dict[str, Any]:
    """Return the content of a sharded checkpoint in the form of a file, with whole tensors on the CPU.

    The state of optimizers names parameters: see :mod:`lightning_peft.trainer.checkpoints.optimizer_names`.

    Args:
        path: a folder that :func:`~lightning_peft.trainer.checkpoints.sharded_folder.save_folder` wrote.
        weights_only: read tensors and plain values only. With False, any code that the files name runs.
        optimizers: read the state of the optimizers too.

    Raises:
        StateError: if the folder is not such a checkpoint, is damaged, or would run code.
    """
    if not (path / META).is_file():
        raise StateError(
            f"{path} is a folder, but not a sharded checkpoint of ModelParallelStrategy or FSDPStrategy: it has no "
            f"{META}. Pass a checkpoint that the Trainer wrote; those of DeepSpeed load only under DeepSpeed"
        )
    if weights_only:
        checkpoint = read_torch_file(path / META)
    else:
        checkpoint = torch.load(path / META, map_location="cpu", weights_only=False)
    check_files(path, checkpoint)
    metadata = check_metadata(path) if weights_only else _metadata(path)
    wanted = {k: v for k, v in metadata.state_dict_metadata.items() if optimizers or _is_module(k)}
    flat = _read(path, wanted, PlainPlanner if weights_only else DefaultLoadPlanner)
    checkpoint["state_dict"] = {k.removeprefix(_MODULE): value for k, value in flat.items() if _is_module(k)}
    if optimizers:
        checkpoint["optimizer_states"] = _optimizers(flat, metadata, path)
    return checkpoint


def _is_module(key: str) -> bool:
    return key.startswith(_MODULE)


def _metadata(path: Path) -> Any:
    return FileSystemReader(path).read_metadata()


def _read(path: Path, wanted: Mapping[str, Any], planner: type[DefaultLoadPlanner]) -> dict[str, Any]:
    """The values in the folder by their flat keys."""
    tensors = {k: v for k, v in wanted.items() if isinstance(v, TensorStorageMetadata)}
    if negative := [k for k, v in tensors.items() if any(n < 0 for n in v.size)]:
        raise StateError(f"{path} is damaged: its .metadata gives {listed(negative)} a negative size")
    # Not numel(), which overflows at 2**63.
    size = sum(math.prod(v.size) * v.properties.dtype.itemsize for v in tensors.values())
    if size > sum(file.stat().st_size for file in path.iterdir()):
        raise StateError(f"{path} is damaged: its .metadata lists tensors that are larger than its files")
    state: dict[str, Any] = {
        k: torch.empty(v.size, dtype=v.properties.dtype) if k in tensors else b"" for k, v in wanted.items()
    }
    # In a process group, dcp.load is a collective, but one process may read the checkpoint alone.
    alone = {"no_dist": True} if "no_dist" in inspect.signature(dcp.load).parameters else {}
    flat = planner(flatten_state_dict=False, flatten_sharded_tensors=False)  # otherwise it fills a copy of the dict
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, checkpoint_id=path, planner=flat, **alone)
    except CheckpointException as error:  # torch collects the errors of all ranks in this BaseException
        first = next(iter(error.failures.values()))[0]
        raise StateError(f"{path} cannot be read: {first}. The checkpoint is damaged: use another copy") from first
    return state


def _optimizers(flat: Mapping[str, Any], metadata: Any, path: Path) -> list[dict[str, Any]]:
    """The states of the optimizers, by parameter name, from their flat values."""
    found: dict[int, dict[str, dict[Any, Any]]] = {}
    for key, value in flat.items():
        if not _is_module(key):
            try:
                optimizer, part, which, option = metadata.planner_data[key]
                number = int(optimizer.rpartition("_")[2])
                which = canonical(which) if part == "state" else int(which)
                found.setdefault(number, {}).setdefault(part, {}).setdefault(which, {})[option] = value
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise StateError(f"{path} is damaged: its .metadata does not say what {key!r} is") from error
    return [
        {
            "state": found[number].get("state", {}),
            "param_groups": [group for _, group in sorted(found[number].get("param_groups", {}).items())],
        }
        for number in sorted(found)
    ]
