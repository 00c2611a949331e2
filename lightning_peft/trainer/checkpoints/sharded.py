"""Save and load only the trainable part of sharded models (FSDP2, tensor parallelism: ``ModelParallelStrategy``).

Lightning gathers the whole model to save it, and requires every key of the model when it loads. Here only the
trainable tensors are gathered, written and required. Lightning itself saves the optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.names import canonical
from lightning_peft.core.record import injection_state
from lightning_peft.core.sharded_tensors import gather_full, sharded_like
from lightning_peft.core.state.state_dict import StateError, check_state, owned_keys, state_keys, trainable_keys
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.core.targeting.base_modules import local_state_dict, without_fsdp_hooks
from lightning_peft.trainer.checkpoints.manifest import check_seal
from lightning_peft.trainer.checkpoints.optimizer_names import in_order
from lightning_peft.trainer.checkpoints.sharded_folder import META, check_files, recover_path, save_folder
from lightning_peft.trainer.checkpoints.trimming import trim_state

__all__ = ["adapt", "adapt_files", "agreed_keys", "load_file"]


def adapt(strategy: Any) -> None:
    """Replace the functions of this ``ModelParallelStrategy`` that collect, save and load the module's state."""

    def lightning_module_state_dict() -> dict[str, Any]:
        module = strategy.lightning_module
        assert module is not None
        state = trim_state(module, local_state_dict(module), agreed_keys(module))
        if strategy._save_distributed_checkpoint:
            return state
        full = {k: _gathered(v) for k, v in state.items()}  # a collective: every rank must call it for every key
        return full if strategy.is_global_zero else {}

    def load(strategy: Any, path: Path, weights_only: bool) -> dict[str, Any]:
        return (_load_directory if path.is_dir() else load_file)(strategy, path, weights_only)

    strategy.lightning_module_state_dict = lightning_module_state_dict
    adapt_files(strategy, strategy._save_distributed_checkpoint, load)


def adapt_files(strategy: Any, folder: bool, load: Callable[[Any, Path, bool], dict[str, Any]]) -> None:
    """Replace the functions of a strategy that write and read checkpoints.

    Args:
        folder: whether the strategy writes each rank's part to a folder, instead of one file.
        load: loads the checkpoint at a path into the strategy's module and optimizers.
    """
    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if folder and storage_options is None:
            save_folder(strategy, checkpoint, Path(strategy.broadcast(filepath)))
        else:
            save(checkpoint, filepath, storage_options)

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(checkpoint_path))
        recover_path(strategy, path)
        return load(strategy, path, True if weights_only is None else weights_only)

    strategy.save_checkpoint = save_checkpoint
    strategy.load_checkpoint = load_checkpoint


def agreed_keys(module: nn.Module) -> set[str]:
    """The keys of the trainable state, including values that moved on any rank.

    Each rank sees only its own part of a sharded parameter, and the value may have moved only in another rank's part.
    This is a collective: all ranks must call it together.
    """
    keys, record = trainable_keys(module), injection_state(module)
    if record is None or not torch.distributed.is_initialized():
        return keys
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, record.moved)
    record.moved = set().union(*everywhere)
    return state_keys(module)


def _gathered(value: Any) -> Any:
    return gather_full(value).detach().cpu() if isinstance(value, torch.Tensor) else value


def load_file(strategy: Any, path: Path, weights_only: bool) -> dict[str, Any]:
    """Load a checkpoint of whole tensors, in one file or in a folder, into the strategy's module and optimizers.

    Raises:
        StateError: if it cannot be read, is damaged, or does not fit the module.
    """
    if path.is_dir():
        from lightning_peft.trainer.checkpoints.folder_reader import read_folder

        checkpoint = read_folder(path, weights_only)
    else:
        checkpoint = _read(path, weights_only)
    module = strategy.lightning_module
    module.on_load_checkpoint(checkpoint)
    state = checkpoint["state_dict"]
    check_state(module, state)
    own = {canonical(k): (k, v) for k, v in local_state_dict(module).items()}
    sharded = {}
    for key, value in state.items():
        name, here = own[canonical(key)]
        sharded[name] = sharded_like(value, here)
    with without_fsdp_hooks(module):
        nn.Module.load_state_dict(module, sharded, strict=False)
    if module.trainer.state.fn == "fit":
        for optimizer, saved in zip(strategy.optimizers, checkpoint["optimizer_states"]):
            _load_optimizer(optimizer, in_order(saved, optimizer, module))
    return checkpoint


def _load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the full state of an optimizer, and shard each tensor like its parameter.

    As in torch, parameters are matched by their order in the groups. The checkpoint of one device numbers the trained
    parameters, and that of ``ModelParallelStrategy`` all parameters of the module, so numbers do not identify them.
    """
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    like = dict(zip((key for group in saved["param_groups"] for key in group["params"]), parameters))
    state = {key: {n: _like(v, like[key]) for n, v in values.items()} for key, values in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": state})


def _like(value: Any, parameter: nn.Parameter) -> Any:
    same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return sharded_like(value, parameter) if same else value


def _read(path: Path, weights_only: bool) -> dict[str, Any]:
    found = read_torch_file(path) if weights_only else torch.load(path, map_location="cpu", weights_only=False)
    check_seal(found, path)
    return found


def _load_directory(strategy: Any, path: Path, weights_only: bool) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    from lightning_peft.trainer.checkpoints.distributed_files import PlainPlanner, check_metadata

    metadata = _read(path / META, weights_only)
    check_files(path, metadata)
    if weights_only:
        check_metadata(path)
    planner = PlainPlanner if weights_only else dcp.DefaultLoadPlanner
    module = strategy.lightning_module
    module.on_load_checkpoint(metadata)
    current = {canonical(key): value for key, value in local_state_dict(module).items()}
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    held = {canonical(key.removeprefix("state_dict.")) for key in stored if key.startswith("state_dict.")}
    if wrong := (owned_keys(module) - held) | (held - current.keys()):
        raise StateError(
            f"{path} does not fit this model: {sorted(wrong)[:8]} are in only one of the two. Attach the methods that "
            "were attached when it was saved"
        )
    # The keys in the file, not only the trainable ones: values that moved without gradients were saved too.
    state = {key: current[key] for key in sorted(held)}
    _read_into({"state_dict": state}, path, planner())
    names = {canonical(k): k for k in module.state_dict()}
    nn.Module.load_state_dict(module, {names[k]: v for k, v in state.items()}, strict=False)
    if module.trainer.state.fn == "fit":
        for i, optimizer in enumerate(strategy.optimizers):
            saved = {f"optimizer_{i}": get_optimizer_state_dict(module, optimizer)}
            _read_into(saved, path, planner())
            set_optimizer_state_dict(module, optimizer, optim_state_dict=saved[f"optimizer_{i}"])
    return metadata


def _read_into(state: dict[str, Any], path: Path, planner: Any) -> None:
    """Read the values of ``state`` from the files in ``path``, in place; a collective.

    Raises:
        StateError: if a file cannot be read or does not hold what its metadata says; the message names ``path``.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(state, checkpoint_id=path, planner=planner)
    except CheckpointException as error:  # torch collects the errors of all ranks in this BaseException
        first = next(iter(error.failures.values()))[0]
        raise StateError(f"{path} cannot be read: {first}. The checkpoint is damaged: use another copy") from first
