"""``lp.load_adapter``: an adapter directory, ours or Hugging Face PEFT's, onto a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core.adapters.lookup import adapter_names
from lightning_peft.core.class_swap import original_class
from lightning_peft.core.injection.apply import check_injectable, install
from lightning_peft.core.injection.overrides import override_trained
from lightning_peft.core.names import check_name
from lightning_peft.core.record import injected_module, injection_state
from lightning_peft.core.state.consistency import check_record
from lightning_peft.core.state.fingerprint import check_fingerprint
from lightning_peft.core.state.plan import Method, Plan
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.switching.active import deactivate
from lightning_peft.core.targeting.base_model import Base, base_for_keys, base_of
from lightning_peft.core.untrusted import AllocationLimit, FormatError, check_regexes
from lightning_peft.formats.directory.files import CONFIG, AdapterFiles, adapter_folders, read_files
from lightning_peft.formats.directory.seal import check_options
from lightning_peft.formats.peft.base_values import take_base_values
from lightning_peft.formats.peft.common_options import base_facts, shared_modules_of
from lightning_peft.formats.peft.converter import PREFIX, Options, Reading, Tensors
from lightning_peft.formats.peft.older_layouts import in_current_layout
from lightning_peft.formats.registry import converter_for_type
from lightning_peft.methods.families.method import PEFTMethod
from lightning_peft.trainer.brought_along import is_registered
from lightning_peft.trainer.module import adapt_module
from lightning_peft.trainer.prepare_run import prepare_run

__all__ = ["load_adapter", "read_plan", "saved_name"]


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    trainable: bool = False,
    check_base: bool = True,
    ignore_options: Collection[str] = (),
) -> list[str]:
    """Put the adapter of a directory, ours or Hugging Face PEFT's, into ``model``.

    All is read and checked before anything is changed: an error leaves the model as it was. The adapter is frozen and
    takes part at once where the model carries no other; beside others it waits for :func:`lightning_peft.set_active`.
    Heads, biases and statistics that were trained with it come as copies of its own, in place of the base's while it
    is active.

    Args:
        model: any module that holds the base: a LightningModule, or the bare model.
        directory: one that holds ``adapter_config.json``; or one of folders that do: then all of them are loaded, each
            under its folder's name.
        name: what to call the adapter; by default what it was called when it was saved.
        trainable: let its parameters train.
        check_base: refuse an adapter that was trained on another base. Files of PEFT's own do not say on which.
        ignore_options: names of options in ``adapter_config.json`` that this release does not know and that change
            nothing, as a newer PEFT or another tool may write them. By default an unknown option with a value is an
            error, since it may change what the adapter computes.

    Returns:
        The adapters' names.

    Raises:
        FormatError: a file that cannot be read or trusted, an option that would compute something else, a tensor that
            is missing, misshapen or left over; named with what was expected.
        StateError: the adapter was trained on another base; a module of the model that carried adapters was replaced.
        ValueError: the model has an adapter of that name already.
        InjectionError: the model is compiled or sharded.

    Example::

        lp.load_adapter(model, "runs/summaries")
        lp.load_adapter(model, "runs/questions", name="questions")
        lp.set_active(model, "questions")
    """
    root = injected_module(model)
    check_record(root)
    check_injectable(root)
    folders = [Path(directory)] if (Path(directory) / CONFIG).exists() else adapter_folders(directory)
    if name is not None and len(folders) > 1:
        raise ValueError(
            f"{directory} holds the adapters {', '.join(f.name for f in folders)}, which cannot all be called "
            f"{name!r}: give the folder of one, such as {folders[0]}, or no name"
        )
    taken = [*adapter_names(root), *(record.methods if (record := injection_state(root)) is not None else ())]
    plans: dict[str, tuple[Method, Plan]] = {}
    for folder in folders:
        files = read_files(folder)
        called = name or (folder.name if len(folders) > 1 else saved_name(files))
        check_name(called)
        if called in taken:
            raise ValueError(f"the model already has an adapter named {called!r}: give this one another name=")
        try:
            plans[called] = _planned(root, files, called, trainable, check_base, ignore_options)
        except StateError as error:
            hint = "; check_base=False skips this comparison" if "another base" in str(error) else ""
            raise StateError(f"{_describe_load(files, root)}: {error}{hint}") from error
        except Exception as error:  # what a file says can lead to any error
            what = str(error) if isinstance(error, ValueError) else f"an option has a value it cannot have: {error!r}"
            raise FormatError(f"{_describe_load(files, root)}: {what}") from error
    install(root, plans)
    if trainable and isinstance(model, L.LightningModule):
        adapt_module(model)  # so that its checkpoints say what they hold
        if (trainer := model._trainer) is not None:  # in setup or configure_model, after callbacks were collected
            prepare_run(trainer, model)
    elif trainable and not is_registered():
        warnings.warn(
            f"{type(model).__name__} is not a LightningModule, and this copy of lightning_peft is not installed, so a "
            "Trainer cannot find this adapter: checkpoints would hold the whole model, without a manifest. Install the "
            "package (pip install), or load the adapter onto the LightningModule",
            stacklevel=2,
        )
    if taken:
        for called in plans:
            deactivate(root, called)
    return list(plans)


def _describe_load(files: AdapterFiles, root: nn.Module) -> str:
    """What does not go where, for an error."""
    facts = base_facts(files.metadata, files.directory)
    made_for = " of ".join(str(n) for n in (facts.get("base"), files.config.get("base_model_name_or_path")) if n)
    kind = original_class(base_of(root).module).__name__
    return f"{files.directory}{f', made for {made_for!a},' if made_for else ''} onto {kind}"


def saved_name(files: AdapterFiles) -> str:
    """What the adapter was called when it was saved."""
    return str(base_facts(files.metadata, files.directory).get("config", {}).get("name", "default"))


def _planned(
    root: nn.Module, files: AdapterFiles, name: str, trainable: bool, check_base: bool, ignored: Collection[str]
) -> tuple[Method, Plan]:
    """The method and the plan by which ``root`` gets the adapter beside others; changes nothing."""
    method, plan, own = read_plan(root, files, name, check_base, ignored)
    if not trainable:
        for adapter in (a.adapter for a in plan.attach):
            adapter.requires_grad_(False)
    override_trained(plan, root, own, trainable)
    return method, plan


def read_plan(
    root: nn.Module, files: AdapterFiles, name: str, check_base: bool, ignored: Collection[str] = ()
) -> tuple[PEFTMethod, Plan, dict[str, Tensor]]:
    """The method that made an adapter, its plan with the values of the file, and what it trained of the base itself.

    Args:
        root: what to put the adapter into; left as it is.
        files: the adapter's.
        name: what to call it.
        check_base: whether to compare the base.
        ignored: unknown options to leave out.

    Raises:
        FormatError, StateError: see :func:`load_adapter`.
    """
    config, named = in_current_layout(files.config, files.tensors, base_of(root))
    base = base_for_keys(root, [key.removeprefix(PREFIX) for key in named])
    if check_base and "fingerprint" in (facts := base_facts(files.metadata, files.directory)):
        check_fingerprint(base.module, facts["fingerprint"], plain=injection_state(root) is None)
    options, tensors = Options(config, ignored), Tensors(named)
    check_regexes(files.config, [name for name, _ in (*root.named_modules(), *root.named_parameters())])
    converter = converter_for_type(options.get("peft_type"))
    ours = base_facts(files.metadata, files.directory)
    heads, own = take_base_values(
        options, tensors, base, converter.prefix, tie=bool(ours) and not ours.get("all_names")
    )
    reading = converter.read(options, tensors, base, name, trainable=base.patterns(heads))
    options.done()
    tensors.done()
    with AllocationLimit(root, files.tensors):
        plan = reading.method.plan(root)
    if not ours:
        _check_shared(plan, base)
    _fill(plan, reading, base)
    own |= reading.own
    check_options(files.config, files.metadata, str(files.directory))
    plan.origin = {"task_type": files.config["task_type"]} if "task_type" in files.config else {}
    return reading.method, plan, {base.outer(key): value for key, value in own.items()}


def _check_shared(plan: Plan, base: Base) -> None:
    """Refuse a file of PEFT's for a module that has several names, of which PEFT adapts the first alone."""
    touched = [base.inner(name) or "" for name in (*(a.host for a in plan.attach), *plan.train_modules)]
    for name, others in shared_modules_of(base, touched).items():
        raise FormatError(
            f"{name!r} is one module with {others}: PEFT adapts it under the first name only, and an adapter here acts "
            "under each, which computes something else. Give the other names modules of their own first"
        )


@torch.no_grad()
def _fill(plan: Plan, reading: Reading, base: Base) -> None:
    """Give the adapters of a plan the values that were read."""
    left = {base.outer(name): tensors for name, tensors in reading.tensors.items()}
    for host, adapter in ((a.host, a.adapter) for a in plan.attach):
        weights: dict[str, nn.Module] = {part.site_name: part for part in adapter.weights().values()}
        for name, part in (weights or {host: adapter}).items():
            _fill_one(part, name, left.pop(name, {}))
    if left:
        raise FormatError(f"nothing takes the tensors of {sorted(left)}")


def _fill_one(adapter: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    state = adapter.state_dict()
    absent = dict(adapter.named_parameters()).keys() - tensors.keys()
    unknown = tensors.keys() - state.keys()
    wrong = {key: t for key, t in tensors.items() if key in state and t.shape != state[key].shape}
    if absent or unknown or wrong:
        shapes = [f"{key} is {tuple(t.shape)}, not {tuple(state[key].shape)}" for key, t in wrong.items()]
        raise FormatError(f"{name!r}: missing {sorted(absent)}, unknown {sorted(unknown)}, misshapen {shapes}")
    adapter.load_state_dict(tensors, strict=False)
