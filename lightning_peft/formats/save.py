"""``lp.save_adapter``: save an adapter as a directory in Hugging Face PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.injection.saving_trial import saving_trials
from lightning_peft.core.names import join, listed
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.adapter_records import uncopied
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.targeting.base_modules import holds_shards
from lightning_peft.formats.directory.card import model_card
from lightning_peft.formats.directory.facts import METADATA
from lightning_peft.formats.directory.files import check_content, json_text, write_files
from lightning_peft.formats.directory.snapshot import Snapshot, take_snapshot
from lightning_peft.formats.native import NATIVE, NativeConverter
from lightning_peft.formats.peft.base_values import modules_to_save, write_base_values
from lightning_peft.formats.peft.common_options import common_options, shared_modules_of
from lightning_peft.formats.peft.converter import PREFIX, NotInPeftError
from lightning_peft.formats.registry import converter_for_method
from lightning_peft.trainer.logs.artifacts import adapter_writers

__all__ = ["adapter_content", "save_adapter", "try_writing", "write_snapshots"]


def save_adapter(
    model: nn.Module, directory: str | Path, name: str | None = None, *, fold_scale: bool = False
) -> list[str]:
    """Write an adapter to a directory: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The files have Hugging Face PEFT's format if it can represent the adapter. Otherwise ``peft_type`` is
    ``LIGHTNING_PEFT``, and ``reason`` says what PEFT lacks.

    In a distributed run only rank 0 writes. For a sharded model (FSDP2) every process must call this, because it
    gathers the shards; otherwise calls on other ranks have no effect. No process waits until the files exist.

    Args:
        model: An adapted module, trained or not.
        directory: The output directory; created if it does not exist.
        name: The adapter to save; by default all of them. A single adapter is written to ``directory`` itself, several
            to subdirectories with their names.
        fold_scale: Multiply LoRA's B by the scale, for tools that ignore alpha and rsLoRA.

    Returns:
        The names of the saved adapters.

    Raises:
        ValueError: if the model has no adapter of that name.
        StateError: if adapters are merged into the weights, or a tensor is sharded and cannot be gathered.
        FormatError: if the adapter could not be read again, for example because a tensor is not finite.
    """
    record = injection_state(model)
    names = [name] if name is not None else list(record.methods) if record is not None else [""]
    snapshots = {each: take_snapshot(model, each) for each in names}
    if holds_shards(model):
        _check_gathered(snapshots.values())
    write_snapshots(snapshots, directory, fold_scale)
    return names


def _check_gathered(snapshots: Iterable[Snapshot]) -> None:
    """Refuse tensors of a sharded model that are empty on this rank, as those of DeepSpeed's ZeRO stage 3 are."""
    for snapshot in snapshots:
        tensors = dict(snapshot.trained)
        for record in snapshot.adapter_records:
            tensors |= {join(record.name, key): value for key, value in record.tensors.items()}
        if empty := [key for key, value in tensors.items() if not value.numel()]:
            raise StateError(
                f"{listed(empty)} cannot be saved: the model is sharded, and this process has no part of these "
                "tensors. Save a checkpoint with the Trainer and run lightning-peft export on it"
            )


def write_snapshots(snapshots: Mapping[str, Snapshot], directory: str | Path, fold_scale: bool = False) -> None:
    """Write one adapter to ``directory`` itself, or several to subdirectories with their names.

    In a distributed run only rank 0 writes. There is no barrier, because rank 0 may be the only rank that calls this.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        for name, snapshot in snapshots.items():
            write_snapshot(snapshot, Path(directory) / name if len(snapshots) > 1 else Path(directory), fold_scale)


def write_snapshot(snapshot: Snapshot, directory: Path, fold_scale: bool = False) -> None:
    """Write the snapshot of one adapter to ``directory``."""
    config, tensors, metadata, card = adapter_content(snapshot, fold_scale)
    write_files(directory, config, tensors, metadata, card)


def try_writing(model: nn.Module, name: str) -> str | None:
    """Do everything that saving an adapter does, except copying tensors, checking their values and writing files.

    Returns:
        A note for the user if PEFT has the method but could not read this adapter; None otherwise.

    Raises:
        Exception: any exception that saving would raise.
    """
    snapshot = take_snapshot(model, name, uncopied)
    config, tensors, _, _ = adapter_content(snapshot)
    check_content(config, tensors, values=False)
    if config["peft_type"] != NATIVE or converter_for_method(snapshot.method) is None:
        return None
    return f"lp.save_adapter will write this package's own format, which PEFT cannot read: {config['reason']}"


saving_trials.append(try_writing)
adapter_writers.append(save_adapter)


def adapter_content(
    snapshot: Snapshot, fold_scale: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str], str]:
    """Return the content of an adapter directory: configuration, tensors, metadata of their file, and model card."""
    converter = converter_for_method(snapshot.method)
    own: dict[str, Any]
    prefix = PREFIX if converter is None else converter.prefix
    try:
        if converter is None:
            raise NotInPeftError(f"{type(snapshot.method).__name__} has no counterpart in PEFT")
        for name, others in shared_modules_of(
            snapshot.base, [p.host for p in snapshot.adapter_records] + snapshot.heads
        ).items():
            raise NotInPeftError(f"{name!r} and {others} are the same module, and PEFT would adapt only one name of it")
        writing = converter.write(snapshot, fold_scale=fold_scale)
        peft_type, own = converter.peft_type, {"modules_to_save": modules_to_save(snapshot)}
    except NotInPeftError as reason:
        writing, peft_type, own = NativeConverter().write(snapshot), NATIVE, {"reason": str(reason)}
        prefix = PREFIX
    config = {**common_options(snapshot, peft_type), **writing.config, **own}
    tensors = writing.tensors | write_base_values(snapshot, writing.wrapped, prefix)
    metadata = {METADATA: json_text(_facts(snapshot))}
    return config, tensors, metadata, model_card(snapshot, config, tensors)


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    method = snapshot.method
    return {
        "version": 1,
        "all_names": True,  # a tied value is written under each of its names; older releases wrote only one
        "method": type(method).__name__,
        "config": method.config(),
        "base": snapshot.base.facts()["class"],
        "labels": snapshot.base.facts().get("labels"),  # absent in checkpoints of earlier releases
        "fingerprint": snapshot.fingerprint,
        "metrics": snapshot.metrics,
    }
