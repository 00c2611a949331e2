"""The manifest: a checkpoint's record of the methods that made it, in plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lightning_peft.core.adapters.base import Adapter
from lightning_peft.core.adapters.lookup import active_names, stacks
from lightning_peft.core.names import is_adapter_key
from lightning_peft.core.record import InjectionState, TrainedBase, injected_module, injection_state
from lightning_peft.core.sharded_tensors import is_sharded
from lightning_peft.core.state.adapter_records import AdapterRecord
from lightning_peft.core.state.consistency import check_record, update_base
from lightning_peft.core.state.digest import difference, tensor_digests, value_digest
from lightning_peft.core.state.freezing import unfrozen_names
from lightning_peft.core.state.state_dict import StateError, adapter_state, owned_keys, state_keys
from lightning_peft.core.state.torch_file import read_torch_file
from lightning_peft.core.targeting.base_model import base_of
from lightning_peft.trainer.checkpoints.unsafe_hparams import restore_unsafe_hparams

__all__ = ["KEY", "check_manifest", "check_seal", "is_trained", "manifest", "read_checkpoint", "scores", "sealed"]

KEY = "lightning_peft"
VERSION = 1


def manifest(model: nn.Module) -> dict[str, Any]:
    """Return the manifest of an adapted model: methods and configurations, base fingerprint, parameter counts.

    The keys ``copies``, ``parts``, ``own`` and ``thawed`` are part of the file format; they keep their names although
    the code now says overrides, adapter records, trained base and unfrozen.
    """
    check_record(model)
    record = injection_state(model)
    assert record is not None
    update_base(model)
    return {
        "version": VERSION,
        "methods": [
            {
                "method": type(method).__name__,
                "config": method.config(),
                "trains": is_trained(model, name),
                "copies": has_overrides(model, name),
                "parts": [_plain(part) for part in record.adapter_records.get(name, ())],
                "own": asdict(_trained_base(model, record, name)),
                "origin": record.origins.get(name, {}),
            }
            for name, method in record.methods.items()
        ],
        "base": _base_facts(model, record),
        "active": sorted(active_names(model)),
        "fingerprint": record.fingerprint,
        "thawed": unfrozen_names(model),
        "state": sorted(state_keys(model)),
        "trainable": record.report.trainable,
        "total": record.report.total,
    }


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", mmap: bool = False, weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint and check that it has a manifest.

    Args:
        path: A file or sharded checkpoint that a Trainer wrote; the latter is read to the CPU, without optimizers.
        map_location: The device to load the tensors to.
        mmap: Leave the values in the file until they are used. The digests are then not checked.
        weights_only: Read tensors and plain values only. With False, any code that the file names runs.

    Raises:
        StateError: if the file cannot be read, has no manifest, does not match its digests, or would run code.
    """
    if Path(path).is_dir():
        from lightning_peft.trainer.checkpoints.folder_reader import read_folder

        checkpoint = read_folder(Path(path), weights_only, optimizers=False)
    elif weights_only:
        checkpoint = read_torch_file(path, map_location, mmap=mmap)
    else:
        checkpoint = torch.load(path, map_location=map_location, weights_only=False, mmap=mmap or None)
        restore_unsafe_hparams(checkpoint)
    if not mmap:  # a digest reads every value, which mmap is there to avoid
        check_seal(checkpoint, path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise StateError(f"{path} has no {KEY!r} manifest: it was not saved by a run with methods attached")
    return checkpoint


def sealed(manifest: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with digests of itself and of ``state``.

    A distributed checkpoint gets no digests of its state, because no process holds a whole tensor.
    """
    whole = not any(map(is_sharded, state.values()))
    tensors = {"tensors": tensor_digests(state)} if whole else {}
    return {**manifest, "digests": {"manifest": value_digest(manifest), **tensors}}


def check_seal(checkpoint: Any, where: str | Path) -> None:
    """Compare a checkpoint with the digests in its manifest, if there are any.

    Raises:
        StateError: if the manifest or a tensor of the state has changed since it was saved; the message names it.
    """
    manifest = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(manifest, dict) or "digests" not in manifest:
        return
    digests, state = manifest["digests"], checkpoint.get("state_dict")
    digests = digests if isinstance(digests, dict) else {}
    # The ids of the loggers' runs are added after the digests are computed.
    plain = {key: value for key, value in manifest.items() if key not in ("digests", "wandb", "mlflow")}
    wrong = "the manifest has changed" if digests.get("manifest") != value_digest(plain) else None
    if wrong is None and "tensors" in digests and isinstance(state, dict):
        wrong = difference(digests["tensors"], tensor_digests(state))
    if wrong is not None:
        raise StateError(
            f"{where} has changed since it was saved: {wrong}. The file is damaged or was edited: use another copy"
        )


def scores(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The scores that ``ModelCheckpoint`` recorded, by the name of the monitored metric."""
    found = {}
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("monitor") and state.get("current_score") is not None:
            found[str(state["monitor"])] = float(state["current_score"])
    return found


def _trained_base(model: nn.Module, record: InjectionState, name: str) -> TrainedBase:
    """The modules and parameters of the base that the method trains, either in place or as overrides."""
    if not has_overrides(model, name):
        return record.trained_base.get(name, TrainedBase())
    method, root = cast(Any, record.methods[name]), injected_module(model)
    return TrainedBase(tuple(method.trainable_modules(root)), tuple(method.trained_parameters(root)))


def _plain(part: AdapterRecord) -> dict[str, Any]:
    return {"host": part.host, "parameter": part.parameter, "kind": part.kind, "shape": part.shape, "facts": part.facts}


def _base_facts(model: nn.Module, record: InjectionState) -> dict[str, Any]:
    """Facts about the base that an adapter directory needs, so that a checkpoint alone is enough to export one."""
    own = [name for trains in record.trained_base.values() for name in (*trains.modules, *trains.parameters)]
    hosts = [part.host for parts in record.adapter_records.values() for part in parts]
    base = base_of(injected_module(model), [*hosts, *own])
    return {"name": base.name, **base.facts(), "modules": [name for name in base.modules() if name]}


def is_trained(model: nn.Module, name: str) -> bool:
    """Whether the method or adapter ``name`` trains; an adapter is loaded frozen unless asked otherwise."""
    record = injection_state(model)
    assert record is not None
    return bool(record.trained_base.get(name))


def has_overrides(model: nn.Module, name: str) -> bool:
    """Whether the adapter ``name`` overrides parameters of the base with its own values, as a loaded adapter does."""
    adapters = [cast(Adapter, stack[name]) for stack in stacks(model).values() if name in stack]
    return any(part.overrides() for adapter in adapters for part in adapter.components())


def check_manifest(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Compare the methods that made a checkpoint with those attached now.

    A frozen adapter may be on one side only. One that only the checkpoint has is removed from ``checkpoint`` in place;
    one that only the model has keeps its values.

    Raises:
        StateError: if the checkpoint has no manifest, a newer manifest version, or lost tensors; or if a method is
            missing, is of another class, or has another configuration.
    """
    record, state = injection_state(model), checkpoint.get("state_dict", {})
    assert record is not None
    saved = _readable(checkpoint.get(KEY))
    # Loading checks the keys that every model needs. This finds the others, such as moved buffers, that were saved
    # and are gone. A distributed checkpoint stores its tensors in other files.
    said = set(saved.get("state", ())) if "state_dict" in checkpoint else set()
    lost = sorted(said - state.keys() - owned_keys(model))
    if lost:
        raise StateError(
            f"the checkpoint lacks {', '.join(lost[:5])}, although its manifest lists it: it was removed after saving. "
            "Use the file that the Trainer wrote"
        )
    there = {entry["config"]["name"]: entry for entry in saved["methods"]}
    for name, entry in there.items():
        if name in record.methods:
            continue
        if entry.get("trains", True):
            raise StateError(
                f"the checkpoint holds a {entry['method']} named {name!r}, but this run attaches only "
                f"{list(record.methods)}: attach it too"
            )
        for key in [k for k in state if is_adapter_key(k, name)]:
            del state[key]
    for name, method in record.methods.items():
        if name in there:
            _check_method(model, name, method, there[name])
        elif is_trained(model, name):
            raise StateError(
                f"this run attaches a {type(method).__name__} named {name!r}, but the checkpoint holds only "
                f"{list(there)}: remove it, or use the name it was saved under"
            )
        else:
            state.update(adapter_state(model, name))


def _readable(saved: Any) -> Mapping[str, Any]:
    """``saved``, checked to be a manifest of a version that this release reads."""
    if saved is None:
        raise StateError(
            "this checkpoint was saved without adapters: it has no 'lightning_peft' manifest. To start from its "
            "weights, load them in your module (torch.load and load_state_dict); ckpt_path= resumes an adapted run"
        )
    if saved["version"] > VERSION:
        raise StateError(
            f"this checkpoint has manifest version {saved['version']}, but this release reads versions up to "
            f"{VERSION}: update lightning_peft"
        )
    return saved


def _check_method(model: nn.Module, name: str, method: Any, entry: Mapping[str, Any]) -> None:
    """Check that the method called ``name`` is the one that ``entry`` of a manifest describes."""
    kind = type(method).__name__
    if entry["method"] != kind:
        raise StateError(
            f"{name!r} is a {entry['method']} in the checkpoint, but a {kind} in this run: attach the "
            "method that was saved"
        )
    if entry.get("copies", False) != has_overrides(model, name) and is_trained(model, name):
        # The keys of the two differ: a method trains heads and biases in place, an adapter holds its own values.
        ways = ["as a method", "by lp.load_adapter(..., trainable=True), with its own copy of heads and biases"]
        here, then = ways if entry.get("copies") else ways[::-1]
        raise StateError(
            f"{name!r} was attached {then} in the run that saved this checkpoint, but {here} in this run: attach "
            "it as that run did, or convert its directory to a checkpoint (lightning-peft export, import)"
        )
    config, fixed = entry["config"], method.config().keys() - type(method).resume_may_differ
    for option in sorted(fixed & config.keys()):
        if config[option] != method.config()[option]:
            raise StateError(
                f"{kind} {name!r} was saved with {option}={config[option]!r}, but this run has "
                f"{option}={method.config()[option]!r}: use the saved value"
            )
