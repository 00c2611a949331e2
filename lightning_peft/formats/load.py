"""``lp.load_adapter``: load an adapter directory, written by this package or Hugging Face PEFT, onto a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import adapter_names
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.injection.apply import install
from lightning_peft.core.injection.checks import check_injectable
from lightning_peft.core.injection.overrides import override_trained
from lightning_peft.core.names import check_name
from lightning_peft.core.optional import config_value, label_names
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.state.consistency import check_record
from lightning_peft.core.state.fingerprint import OtherBaseError, check_fingerprint
from lightning_peft.core.state.plan import Method, Plan
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.switching.active import deactivate
from lightning_peft.core.targeting.base_model import Base, base_for_keys, base_of
from lightning_peft.core.targeting.base_modules import base_modules, base_parameters
from lightning_peft.core.untrusted import AllocationLimit, FormatError, check_regexes
from lightning_peft.formats.directory.artifact import local_directory
from lightning_peft.formats.directory.facts import base_facts
from lightning_peft.formats.directory.files import CONFIG, AdapterFiles, adapter_folders, read_files
from lightning_peft.formats.directory.seal import check_options
from lightning_peft.formats.peft.base_values import take_base_values
from lightning_peft.formats.peft.common_options import shared_modules_of
from lightning_peft.formats.peft.converter import PREFIX, Options, Reading, Tensors
from lightning_peft.formats.peft.older_layouts import in_current_layout
from lightning_peft.formats.registry import converter_for_type
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.trainer.brought_along import is_registered
from lightning_peft.trainer.module import adapt_module
from lightning_peft.trainer.prepare_run import prepare_run

__all__ = ["load_adapter", "read_plan", "saved_name", "saved_preparations"]


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    trainable: bool = False,
    check_base: bool = True,
    ignore_options: Collection[str] = (),
) -> list[str]:
    """Load an adapter directory, written by this package or by Hugging Face PEFT, onto ``model``.

    Everything is read and checked before the model is changed: if loading fails, the model is unchanged. The adapter
    is loaded frozen. It is active at once if the model has no other adapter; otherwise activate it with
    :func:`lightning_peft.set_active`. Heads, biases and statistics that were trained with it are loaded as overrides,
    which replace the base's values while the adapter is active.

    Args:
        model: Any module that holds the base: a LightningModule, or the bare model.
        directory: A directory with ``adapter_config.json``, or one whose subdirectories have it: then all of them are
            loaded, each under its folder's name. ``"wandb:entity/project/adapter-<run id>:v0"`` downloads the artifact
            that a run logged to W&B.
        name: The adapter's name; by default the name it was saved under.
        trainable: Make the adapter's parameters trainable.
        check_base: Refuse an adapter that was trained on another base. Files written by PEFT do not identify the base,
            so they are not checked.
        ignore_options: Names of options in ``adapter_config.json`` to ignore. By default, an option that this release
            does not know and that has a value is an error, because it may change the adapter's output.

    Returns:
        The names of the loaded adapters.

    Raises:
        FormatError: if a file is malformed, if an option is not supported, or if a tensor is missing, misshapen or
            not expected.
        StateError: if the adapter was trained on another base, or if an adapted module of the model was replaced.
        ValueError: if the model already has an adapter of that name.
        InjectionError: if the model is compiled or sharded.

    Example::

        lp.load_adapter(model, "runs/summaries")
        lp.load_adapter(model, "runs/questions", name="questions")
        lp.set_active(model, "questions")
    """
    root = injected_module(model)
    check_record(root)
    check_injectable(root)
    taken = [*adapter_names(root), *(record.methods if (record := injection_state(root)) is not None else ())]
    plans: dict[str, tuple[Method, Plan]] = {}
    # All adapters are planned before any is installed, so an error in one leaves the model unchanged.
    folders = _folders(directory, name)
    for folder in folders:
        files = read_files(folder)
        called = name or (folder.name if len(folders) > 1 else saved_name(files))
        check_name(called)
        if called in taken:
            raise ValueError(f"the model already has an adapter named {called!r}: give this one another name=")
        plans[called] = _planned(root, files, called, trainable, check_base, ignore_options)
    install(root, plans)
    _name_labels(root, files)
    if trainable:
        _let_trainer_find_adapter(model)
    if taken:
        for called in plans:
            deactivate(root, called)
    return list(plans)


def _folders(directory: str | Path, name: str | None) -> list[Path]:
    """The folders of adapters in ``directory``: itself, or its subfolders.

    Raises:
        ValueError: if there are several, and ``name`` is given.
    """
    directory = local_directory(directory)
    folders = [Path(directory)] if (Path(directory) / CONFIG).exists() else adapter_folders(directory)
    if name is not None and len(folders) > 1:
        raise ValueError(
            f"{directory} holds several adapters ({', '.join(f.name for f in folders)}), which cannot all be called "
            f"{name!r}: pass the folder of one, such as {folders[0]}, or leave out name"
        )
    return folders


def _let_trainer_find_adapter(model: nn.Module) -> None:
    """Prepare a model with a trainable adapter for its Trainer, or warn if that is not possible."""
    if isinstance(model, L.LightningModule):
        adapt_module(model)  # gives its checkpoints a manifest, without which they could not be resumed
        # If this runs in setup or configure_model, the Trainer has already collected its callbacks, so ours is added
        # here.
        if (trainer := model._trainer) is not None:
            prepare_run(trainer, model)
    elif not is_registered():
        warnings.warn(
            f"{type(model).__name__} is not a LightningModule, and this copy of lightning_peft is not installed, so a "
            "Trainer cannot find this adapter: checkpoints would hold the whole model, without a manifest. Install the "
            "package (pip install), or load the adapter onto the LightningModule",
            stacklevel=3,
        )


def _name_labels(root: nn.Module, files: AdapterFiles) -> None:
    """Give a classifier the output names that the adapter was trained with, unless the classifier has names already."""
    labels = base_facts(files.metadata, files.directory).get("labels")
    config = getattr(base_of(root).module, "config", None)
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        return
    named = label_names(config)
    # If the number of names differs, they belong to a head that the adapter replaces.
    if isinstance(config_value(config, "id2label"), dict) and (named is None or len(named) != len(labels)):
        config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
        config.label2id = {label: number for number, label in enumerate(labels)}  # type: ignore[union-attr]


def _describe_load(files: AdapterFiles, root: nn.Module) -> str:
    """Name the directory, the base it was made for and the model's class, to begin an error message."""
    facts = base_facts(files.metadata, files.directory)
    made_for = " of ".join(str(n) for n in (facts.get("base"), files.config.get("base_model_name_or_path")) if n)
    kind = original_class(base_of(root).module).__name__
    return f"{files.directory}{f', made for {made_for!a},' if made_for else ''} onto {kind}"


def saved_preparations(directory: str | Path) -> list[Any]:
    """Return what to apply to a plain base before the adapter is loaded, such as the ``QuantizeBase`` it was trained
    with.

    Raises:
        FormatError: if the file's description of it is not valid.
    """
    root = Path(directory)
    files = read_files(root if (root / CONFIG).exists() else adapter_folders(root)[0])
    entries = base_facts(files.metadata, files.directory).get("fingerprint", {}).get("prepared") or []
    try:
        return [method_of_file(entry["method"], entry["config"]) for entry in entries]
    except (TypeError, ValueError, KeyError) as error:
        raise FormatError(f"{files.directory}: the preparation of the base has an invalid value: {error!r}") from error


def saved_name(files: AdapterFiles) -> str:
    """The name that the adapter had when it was saved."""
    return str(base_facts(files.metadata, files.directory).get("config", {}).get("name", "default"))


def _planned(
    root: nn.Module, files: AdapterFiles, name: str, trainable: bool, check_base: bool, ignored: Collection[str]
) -> tuple[Method, Plan]:
    """Return the method and the plan that add the adapter to ``root``, frozen unless ``trainable``; changes nothing.

    Raises:
        FormatError: as :func:`load_adapter`; the message begins with the directory.
        StateError: as :func:`load_adapter`; likewise.
    """
    try:
        method, plan, own = read_plan(root, files, name, check_base, ignored)
        if not trainable:
            for adapter in (a.adapter for a in plan.attach):
                adapter.requires_grad_(False)
        override_trained(plan, root, own, trainable)
        return method, plan
    except StateError as error:
        hint = "; check_base=False skips this comparison" if isinstance(error, OtherBaseError) else ""
        raise StateError(f"{_describe_load(files, root)}: {error}{hint}") from error
    except Exception as error:  # an unexpected value in a file can raise any exception, far from here
        what = str(error) if isinstance(error, ValueError) else f"an option has an invalid value: {error!r}"
        raise FormatError(f"{_describe_load(files, root)}: {what}") from error


def read_plan(
    root: nn.Module, files: AdapterFiles, name: str, check_base: bool, ignored: Collection[str] = ()
) -> tuple[PEFTMethod, Plan, dict[str, Tensor]]:
    """Read the files of an adapter into a plan, without changing the model.

    Args:
        root: The model that the plan is made for; it is not changed.
        files: The adapter's files.
        name: The adapter's name.
        check_base: Whether to compare the base with the one the adapter was trained on.
        ignored: Names of unknown options to ignore.

    Returns:
        The method that made the adapter, its plan with the values of the files, and the values of the base's own
        parameters that it trained, by name in ``root``.

    Raises:
        FormatError: as :func:`load_adapter`.
        StateError: as :func:`load_adapter`.
    """
    config, named = in_current_layout(files.config, files.tensors, base_of(root))
    base = base_for_keys(root, [key.removeprefix(PREFIX) for key in named])
    if check_base and "fingerprint" in (facts := base_facts(files.metadata, files.directory)):
        check_fingerprint(base.module, facts["fingerprint"], plain=injection_state(root) is None)
    options, tensors = Options(config, ignored), Tensors(named)
    # Before any pattern is matched: a file's regular expression could take exponential time on these names.
    check_regexes(files.config, [name for name, _ in (*base_modules(root), *base_parameters(root))])
    converter = converter_for_type(options.get("peft_type"))
    ours = base_facts(files.metadata, files.directory)
    heads, own = take_base_values(
        options, tensors, base, converter.prefix, tie=bool(ours) and not ours.get("all_names")
    )
    reading = converter.read(options, tensors, base, name, trainable=base.patterns(heads))
    options.done()
    tensors.done()
    # Options such as r decide how much the plan allocates. The limit follows from the size of the file's tensors.
    with AllocationLimit((p for _, p in base_parameters(root)), files.tensors):
        plan = reading.method.plan(root)
    if not ours:
        _check_shared(plan, base)
    _fill(plan, reading, base)
    own |= reading.own
    check_options(files.config, files.metadata, str(files.directory))
    plan.origin = {"task_type": files.config["task_type"]} if "task_type" in files.config else {}
    return reading.method, plan, {base.outer(key): value for key, value in own.items()}


def _check_shared(plan: Plan, base: Base) -> None:
    """Refuse a PEFT file for a module that has several names, because PEFT adapts it under the first name only."""
    touched = [base.inner(name) or "" for name in (*(a.host for a in plan.attach), *plan.train_modules)]
    for name, others in shared_modules_of(base, touched).items():
        raise FormatError(
            f"{name!r} and {others} are the same module: PEFT adapts it under the first name only, but an adapter here "
            "has an effect under every name, so the outputs would differ. Make the others separate modules first"
        )


@torch.no_grad()
def _fill(plan: Plan, reading: Reading, base: Base) -> None:
    """Copy the values that were read into the adapters of a plan."""
    left = {base.outer(name): tensors for name, tensors in reading.tensors.items()}
    for host, adapter in ((a.host, a.adapter) for a in plan.attach):
        weights: dict[str, nn.Module] = {part.site_name: part for part in adapter.weights().values()}
        for name, part in (weights or {host: adapter}).items():
            _fill_one(part, name, left.pop(name, {}))
    if left:
        raise FormatError(f"the file has tensors for {sorted(left)}, which its options do not adapt: it was edited")


def _fill_one(adapter: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    state = adapter.state_dict()
    absent = dict(adapter.named_parameters()).keys() - tensors.keys()
    unknown = tensors.keys() - state.keys()
    wrong = {key: t for key, t in tensors.items() if key in state and t.shape != state[key].shape}
    if absent or unknown or wrong:
        shapes = [f"{key} is {tuple(t.shape)}, not {tuple(state[key].shape)}" for key, t in wrong.items()]
        raise FormatError(f"{name!r}: missing {sorted(absent)}, unknown {sorted(unknown)}, misshapen {shapes}")
    adapter.load_state_dict(tensors, strict=False)
