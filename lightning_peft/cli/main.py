"""The command line: LightningCLI's fit, validate, test and predict for any module, and our own commands."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, Union

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelSummary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

import lightning_peft as lp
from lightning_peft.cli.compare import compare
from lightning_peft.cli.curves import LearningCurves
from lightning_peft.cli.export import export
from lightning_peft.cli.flags import in_flags
from lightning_peft.cli.import_adapter import import_adapter
from lightning_peft.cli.merge import merge
from lightning_peft.cli.methods import methods
from lightning_peft.cli.module import find_module
from lightning_peft.cli.output import NoSummary, print_results, silence_other_packages
from lightning_peft.cli.parser import Parser
from lightning_peft.cli.runs import (
    LogConfig,
    attach_saved_methods,
    check_checkpoint,
    check_method,
    check_model,
    files_first,
)
from lightning_peft.cli.serve import serve
from lightning_peft.core.names import nearest
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.pretrained import InputError
from lightning_peft.tasks import PredictionWriter
from lightning_peft.trainer.checkpoints.hyperparameters import saved_arguments
from lightning_peft.trainer.logs.run_ids import resume_runs
from lightning_peft_command import COMMANDS, answer

__all__ = ["PEFTCLI", "PEFTTrainer", "main"]

#: our own commands; lightning_peft_command answers the others, and methods without --import
OWN: dict[str, Callable[[Sequence[str]], None]] = {
    "methods": methods,
    "merge": merge,
    "export": export,
    "import": import_adapter,
    "serve": serve,
    "compare": lambda args: compare(args, PEFTCLI),
}

#: errors that a user can fix by changing a setting; shown as one line instead of a traceback
USER_ERRORS = (
    lp.TargetError,
    lp.InjectionError,
    lp.StateError,
    lp.FormatError,
    lp.AuditError,
    lp.MergeError,
    InputError,
    OSError,
    MisconfigurationException,
)


class PEFTTrainer(L.Trainer):
    """Lightning's Trainer, with an additional ``inspect``, and a ``predict`` that writes a file."""

    def predict(  # type: ignore[override]
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
        adapter_column: str | None = None,
    ) -> None:
        """Predict, and write the predictions to a file.

        Args:
            model: the module.
            datamodule: the rows to predict; they need no label.
            ckpt_path: the checkpoint of a fit.
            weights_only: as for Lightning's ``predict``.
            output: a .csv, .jsonl or .safetensors file; default: predictions.csv, or predictions.safetensors for
                embeddings.
            adapter_column: the column that names the adapter of each row.

        Raises:
            InputError: if ``output`` has a different ending, or the data have no adapter column.
        """
        if adapter_column is not None:
            if datamodule is None or not hasattr(datamodule, "adapter_column"):
                kind = type(datamodule).__name__
                raise InputError(f"--adapter_column needs a DataModule with an attribute adapter_column, not {kind}.")
            datamodule.adapter_column = adapter_column
        self.callbacks.append(PredictionWriter(output))  # type: ignore[attr-defined]
        super().predict(
            model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=weights_only
        )

    def inspect(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Preview what a method adapts; with a PATH, describe that adapter or checkpoint.

        Args:
            model: the module to adapt.
            datamodule: set up if the module needs it to create its layers.
            ckpt_path: accepted so that a ``fit`` configuration also works here; ignored.
            weights_only: accepted so that a ``fit`` configuration also works here; ignored.
        """
        methods = [c for c in self.callbacks if isinstance(c, lp.PEFTMethod)]  # type: ignore[attr-defined]
        model.trainer = self  # the module's own setup may use it
        model.configure_model()
        try:
            report = lp.inspect(model, *methods)
        except lp.TargetError:
            if datamodule is not None:
                datamodule.setup("fit")
            model.setup("fit")  # some modules create their layers in setup
            report = lp.inspect(model, *methods)
        Console().print(report)


class PEFTCLI(LightningCLI):
    """LightningCLI for any ``--model`` and ``--data`` on the Python path, with a key ``method`` for the methods."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                trainer_class=PEFTTrainer,
                save_config_callback=LogConfig,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                parser_kwargs={"prog": "lightning-peft"},
                parser_class=Parser,
                args=args,
                **kwargs,
            )
        except (*USER_ERRORS, ValueError) as error:
            if hasattr(self, "config") and len(error.args) == 1:
                error.args = (in_flags(str(error), self._owners()),)
            raise

    def _owners(self) -> dict[str, type]:
        """The class behind each group of flags that the user gave; the parser has imported it."""
        config = self.config.get(getattr(self, "subcommand", None) or "") or Namespace()
        owners: dict[str, type] = {"trainer": L.Trainer}
        for key in ("method", "model", "data"):
            package, _, name = getattr(config.get(key), "class_path", "").rpartition(".")
            found = getattr(sys.modules.get(package), name, None) if name else None
            if isinstance(found, type):
                owners[key] = found
        return owners

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--method",
            type=Union[lp.PEFTMethod, list[lp.PEFTMethod], None],  # noqa: UP007 - a type that jsonargparse reads
            default=None,
            help="The method, such as LoRA; its arguments are given as --method.r=8. A list trains several together.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if isinstance(args, dict | Namespace):
            self.config, self._given = parser.parse_object(args), parser.parse_object(args, defaults=False)
        else:
            flags = files_first(sys.argv[1:] if args is None else args)
            self.config, self._given = parser.parse_args(flags), parser.parse_args(flags, defaults=False)
        check_model(self.config)

    def _parse_ckpt_path(self) -> None:
        """Add a checkpoint's hyperparameters to the configuration of the class that the user names.

        Lightning's own version also takes the class from the file, and overrides what the user gives.
        """
        command = self.config.get("subcommand") or ""
        path, model = self.config.get(f"{command}.ckpt_path"), self.config.get(f"{command}.model")
        if model is None or not path or not Path(path).is_file():
            return
        checkpoint = read_torch_file(path, mmap=True)  # the Trainer reads the tensors, and checks them
        if not isinstance(checkpoint, dict):
            raise lp.StateError(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}")
        given = self._given.get(f"{command}.model.init_args") or Namespace()
        module_class = find_module(model.class_path)
        used = {name: _as_plain(model.init_args[name]) for name in vars(given)}
        # The configuration that a fit saved has every default, but the checkpoint has the values that the data
        # determined.
        for name in getattr(module_class, "from_data", ()):
            if not used.get(name):
                used.pop(name, None)
        saved = saved_arguments(module_class, checkpoint, used, path)
        if saved:
            over = {"model": {"class_path": model.class_path, "dict_kwargs": saved}}
            self.config = self.parser.parse_object({command: over}, self.config)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse lists one error for each type that it tried; the first is the method's own message.
            reasons = [line.strip(" -") for line in str(error).partition("Errors:")[2].splitlines() if line.strip()]
            raise MisconfigurationException(reasons[0] if reasons else str(error)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        methods = _as_list(self._get(self.config_init, "method"))
        config["callbacks"] = [*methods, *_as_list(config.get("callbacks")), *callbacks]
        if self.subcommand == "fit":
            config["callbacks"].append(LearningCurves())
        shows = config.get("enable_model_summary") is not False
        if shows and not any(isinstance(callback, ModelSummary) for callback in config["callbacks"]):
            config["callbacks"].append(NoSummary())
        return super()._instantiate_trainer(config, [])

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Build the optimizer of the command line when the Trainer asks for it.

        Lightning builds it together with the module, before the layers that depend on the data exist.
        """
        add = super()._add_configure_optimizers_method_to_model
        if not self._get(self.config_init, "optimizer"):
            add(subcommand)
            return

        def configure_optimizers(module: L.LightningModule) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*will be overridden by")  # with the user's schedule
                add(subcommand)
            return vars(module).pop("configure_optimizers")()

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)

    def before_inspect(self) -> None:
        attach_saved_methods(self._get(self.config, "ckpt_path"), self.trainer)

    def before_fit(self) -> None:
        attach_saved_methods(self._get(self.config, "ckpt_path"), self.trainer)
        check_method(self.trainer, self.model)
        # Before the loggers start, so that a resumed run keeps its id.
        resume_runs(self.trainer.loggers, self._get(self.config, "ckpt_path"))

    def after_fit(self) -> None:
        print_results(self.trainer, self.model)

    def _before_evaluation(self) -> None:
        attach_saved_methods(self._get(self.config, "ckpt_path"), self.trainer)
        check_checkpoint(self.config, self.trainer)

    before_validate = before_test = before_predict = _before_evaluation

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "inspect": {"model", "datamodule"}}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _as_plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; ``lightning_peft_command.main`` calls this for the commands that it does not answer itself."""
    # Imported so that the command line and YAML can name these classes without their package.
    import lightning_peft.data
    import lightning_peft.tasks  # noqa: F401

    given = list(sys.argv[1:] if args is None else args)
    if os.getcwd() not in sys.path:
        # Find modules in the current folder, but after all installed packages, since the folder may contain anything.
        # Not "": jsonargparse changes the folder while it parses a file.
        sys.path.append(os.getcwd())
    try:
        imported = _import_modules(given)
        silence_other_packages()
        command, *rest = imported or ["--help"]
        if command in OWN:
            OWN[command](rest)
        elif not answer(imported):
            if command not in COMMANDS and not command.startswith("-"):
                near = nearest(command, COMMANDS, n=3) or list(COMMANDS)
                raise InputError(f"there is no command {command!r}; nearest: {', '.join(near)}")
            PEFTCLI(args=imported)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except ValueError as error:
        if not _is_ours(error):
            raise
        sys.exit(f"error: {error}")


def _is_ours(error: Exception) -> bool:
    """Whether a file of this package raised the error, so that its message is written for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("lightning_peft.")


def _import_modules(arguments: list[str]) -> list[str]:
    """Import the modules given by ``--import``, and return the other arguments.

    Raises:
        InputError: if a module cannot be imported.
    """
    left: list[str] = []
    given = iter(arguments)
    for argument in given:
        option, equals, name = argument.partition("=")
        if option != "--import":
            left.append(argument)
            continue
        name = name if equals else next(given, "")
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"--import {name}: {error}. Give the name of a Python module, such as my_methods for my_methods.py in "
                "the current folder"
            ) from error
    return left
