"""Handle the files of a run: the configuration that it saves, and the checkpoint that a later command gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
from jsonargparse import Namespace
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

import lightning_peft as lp
from lightning_peft.core.record import injection_state
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.core.untrusted import limits_of
from lightning_peft.trainer.checkpoints.manifest import KEY

__all__ = ["LogConfig", "attach_saved_methods", "check_checkpoint", "check_method", "check_model", "files_first"]

_CONFIG = "config.yaml"


class LogConfig(SaveConfigCallback):
    """Save the configuration in the run's folder, and send it to the loggers (W&B shows it as the run's config).

    Paths relative to a configuration file are saved as absolute paths, because the saved file is in another folder.
    """

    def __init__(self, parser: Any, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, _with_absolute_paths(config), *args, **kwargs)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = trainer.log_dir or trainer.default_root_dir
        saved = get_filesystem(folder).isfile(os.path.join(folder, self.config_filename))
        if stage != "fit" and trainer.strategy.broadcast(saved):
            self.save_to_log_dir = False  # keep the configuration of the fit
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        import yaml

        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams({"cli": config})


def _with_absolute_paths(value: Any) -> Any:
    if isinstance(value, jsonargparse.Path):
        return type(value)(value.absolute)
    if isinstance(value, Namespace):
        return Namespace(**{key: _with_absolute_paths(part) for key, part in vars(value).items()})
    if isinstance(value, dict):
        return {key: _with_absolute_paths(part) for key, part in value.items()}
    return [_with_absolute_paths(part) for part in value] if isinstance(value, list) else value


def files_first(arguments: Sequence[str]) -> list[str]:
    """Move every ``--config`` of a command before its other arguments, so that a flag always overrides a file.

    ``--method X`` replaces the file's method; ``--method.r=8`` changes an argument of it.

    A saved configuration has a value for every flag. Without this, its ``ckpt_path: null`` would override an earlier
    ``--ckpt_path x``.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    command, *rest = arguments
    files: list[str] = []
    flags: list[str] = []
    while rest:
        option = rest.pop(0)
        if option in ("-c", "--config") and rest:
            files += [option, rest.pop(0)]
        elif option == "--method" or option.startswith("--method="):
            flags += ["--method=null", option]  # a different method must not inherit arguments from the file
        else:
            (files if option.startswith("--config=") else flags).append(option)
    return [command, *files, *flags]


def check_model(config: Namespace) -> None:
    """Refuse a command without ``--model``. The error names the configuration that the checkpoint's run saved, if any.

    Raises:
        StateError: if no class is named.
    """
    command = config.get("subcommand")
    if not command or config.get(f"{command}.model") is not None:
        return
    path = config.get(f"{command}.ckpt_path")
    saved = _find_config(Path(path)) if path else None
    way = f"--config {saved}, which was saved with the checkpoint," if saved else "--config run.yaml"
    raise lp.StateError(
        f"{command}: --model is missing. A checkpoint is only data and never decides which code is imported: add {way} "
        "or --model my.package.Module and --data my.package.Data"
    )


def check_method(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse a fit without a method.

    The user's own module may apply methods or load adapters while it is set up, so such a module is checked when the
    fit starts; a task of this package is refused at once.

    Raises:
        StateError: if no method is given.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, lp.PEFTMethod) for callback in callbacks):
        callbacks.append(_NeedsMethod())
        if type(module).__module__.startswith("lightning_peft."):
            _NeedsMethod().on_fit_start(trainer, module)


class _NeedsMethod(L.Callback):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if injection_state(pl_module) is None:
            raise lp.StateError(
                "fit: no method is given, so nothing would be adapted. Add one, such as --method LoRA "
                "(`lightning-peft methods` lists all), or --method FullFineTuning to train every parameter"
            )


def _find_config(checkpoint: Path) -> Path | None:
    """Find the configuration of a checkpoint's run, up to four folders up, depending on the logger."""
    folders = list(checkpoint.parents)[:4]
    return next((folder / _CONFIG for folder in folders if (folder / _CONFIG).is_file()), None)


def attach_saved_methods(path: str | None, trainer: L.Trainer) -> None:
    """Attach the methods that a checkpoint lists, unless methods are given.

    Adapters that were loaded frozen are left to the module, which loads them itself.

    Raises:
        StateError: if a method is not defined, or does not accept the saved arguments.
    """
    file = Path(path or "")
    file = file / "meta.pt" if file.is_dir() else file  # a checkpoint of several processes is a folder
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not file.is_file() or any(isinstance(callback, lp.PEFTMethod) for callback in callbacks):
        return
    checkpoint = read_torch_file(file, mmap=file.suffix != ".pt")
    saved = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(saved, dict):
        return
    trained = (entry for entry in saved["methods"] if entry.get("trains", True) and not entry.get("copies", False))
    try:
        methods = [
            method_of_file(entry["method"], entry["config"])
            for entry in (*saved["fingerprint"].get("prepared", ()), *trained)
        ]
    except (ValueError, TypeError) as error:
        raise lp.StateError(
            f"{path}: its method cannot be built: {error}. If the method is your own, add --import my.module with the "
            "module that defines it"
        ) from error
    for method in methods:
        if isinstance(method, lp.PEFTMethod):
            _limit(method, checkpoint.get("state_dict", {}))
    callbacks[:0] = methods


def _limit(method: lp.PEFTMethod, state: Mapping[str, Any]) -> None:
    """Limit what the arguments of a method from a file can allocate, and how long its patterns run."""
    plan = method.plan

    def limited(model: nn.Module) -> Any:
        with limits_of(method.config(), model, state):
            return plan(model)

    method.plan = limited  # type: ignore[method-assign]


def check_checkpoint(config: Namespace, trainer: L.Trainer) -> None:
    """Warn before ``validate``, ``test`` or ``predict`` if the adapters have not been trained.

    Raises:
        StateError: if ``--ckpt_path best`` is given; a new process does not know the best checkpoint.
    """
    command = config["subcommand"]
    given = config[command]
    methods = [c for c in trainer.callbacks if isinstance(c, lp.PEFTMethod)]  # type: ignore[attr-defined]
    if given.get("ckpt_path") not in (None, "best"):
        return
    found = [path for file in given.get("config") or () for path in _find_checkpoints(Path(file.absolute))]
    example = os.path.relpath(max(found, key=os.path.getmtime)) if found else "path/to/best.ckpt"
    if given.get("ckpt_path") == "best":
        raise lp.StateError(
            f"{command} --ckpt_path best: nothing was trained in this process, so it has no best checkpoint. Give its "
            f"path: --ckpt_path {example}"
        )
    if methods:
        rank_zero_warn(
            f"{command}: no --ckpt_path is given, so the adapters and heads of {type(methods[0]).__name__} are "
            f"untrained. To {command} the result of a fit, add --ckpt_path {example}"
        )


def _find_checkpoints(config: Path) -> list[Path]:
    return [*config.parent.glob("checkpoints/*.ckpt"), *config.parent.glob("*.ckpt")]
