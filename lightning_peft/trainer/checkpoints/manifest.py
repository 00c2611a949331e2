"""The manifest: what a checkpoint says of the methods that made it, in plain values only."""

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
    """Methods with their configuration, the base's fingerprint and the counts, of an adapted model."""
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
    """A checkpoint that has a manifest.

    Args:
        path: a file that a Trainer wrote.
        map_location: where to put the tensors.
        mmap: leave their values in the file until they are used.
        weights_only: read tensors and plain values only. With False, any code that the file names runs.

    Raises:
        StateError: it has none, cannot be read, is not what was saved, or would run code.
    """
    if weights_only:
        checkpoint = read_torch_file(path, map_location, mmap=mmap)
    else:
        checkpoint = torch.load(path, map_location=map_location, weights_only=False, mmap=mmap or None)
        restore_unsafe_hparams(checkpoint)
    if not mmap:
        check_seal(checkpoint, path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict):
        raise StateError(f"{path} has no {KEY!r} manifest: it was not saved by a run with methods attached")
    return checkpoint


def sealed(manifest: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with digests of itself and of the state that it goes with.

    A distributed checkpoint has none of the state: no process holds a whole tensor of it.
    """
    whole = not any(map(is_sharded, state.values()))
    tensors = {"tensors": tensor_digests(state)} if whole else {}
    return {**manifest, "digests": {"manifest": value_digest(manifest), **tensors}}


def check_seal(checkpoint: Any, where: str | Path) -> None:
    """Compare a checkpoint with the digests in its manifest, if there are any.

    Raises:
        StateError: a tensor of the state, or the manifest itself, is not what was saved; named.
    """
    manifest = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(manifest, dict) or "digests" not in manifest:
        return
    digests, state = manifest["digests"], checkpoint.get("state_dict")
    digests = digests if isinstance(digests, dict) else {}
    plain = {key: value for key, value in manifest.items() if key not in ("digests", "wandb")}
    wrong = "the manifest has changed" if digests.get("manifest") != value_digest(plain) else None
    if wrong is None and "tensors" in digests and isinstance(state, dict):
        wrong = difference(digests["tensors"], tensor_digests(state))
    if wrong is not None:
        raise StateError(
            f"{where} is not what was saved: {wrong}. The file is damaged, or was edited: take another copy of it"
        )


def scores(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The values by which ``ModelCheckpoint`` chose, by the name of what it watched."""
    found = {}
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("monitor") and state.get("current_score") is not None:
            found[str(state["monitor"])] = float(state["current_score"])
    return found


def _trained_base(model: nn.Module, record: InjectionState, name: str) -> TrainedBase:
    """What a method trains of the base itself; where copies of its own do, the heads among them."""
    if not has_overrides(model, name):
        return record.trained_base.get(name, TrainedBase())
    method, root = cast(Any, record.methods[name]), injected_module(model)
    return TrainedBase(tuple(method.trainable_modules(root)), tuple(method.trained_parameters(root)))


def _plain(part: AdapterRecord) -> dict[str, Any]:
    return {"host": part.host, "parameter": part.parameter, "kind": part.kind, "shape": part.shape, "facts": part.facts}


def _base_facts(model: nn.Module, record: InjectionState) -> dict[str, Any]:
    """What an adapter directory says of the base, so that one can be made from a checkpoint alone."""
    own = [name for trains in record.trained_base.values() for name in (*trains.modules, *trains.parameters)]
    hosts = [part.host for parts in record.adapter_records.values() for part in parts]
    base = base_of(injected_module(model), [*hosts, *own])
    return {"name": base.name, **base.facts(), "modules": [name for name in base.modules() if name]}


def is_trained(model: nn.Module, name: str) -> bool:
    """Whether what was put in under ``name`` trains; a loaded adapter is frozen, and a part of the base so to speak."""
    record = injection_state(model)
    assert record is not None
    return bool(record.trained_base.get(name))


def has_overrides(model: nn.Module, name: str) -> bool:
    """Whether what was put in under ``name`` has values of its own in place of the base's, as a loaded adapter does."""
    adapters = [cast(Adapter, stack[name]) for stack in stacks(model).values() if name in stack]
    return any(part.overrides() for adapter in adapters for part in adapter.components())


def check_manifest(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Compare the methods that made a checkpoint with those attached now.

    Frozen adapters may be there on either side only: they are left out of the checkpoint's state, or stay as they are.

    Raises:
        StateError: no manifest; another version; a method missing, added or of another configuration.
    """
    record, saved, state = injection_state(model), checkpoint.get(KEY), checkpoint.get("state_dict", {})
    assert record is not None
    if saved is None:
        raise StateError(
            "this checkpoint was saved without adapters: it has no 'lightning_peft' manifest. To start from its "
            "weights, load them in your module (torch.load and load_state_dict); ckpt_path= resumes an adapted run"
        )
    if saved["version"] > VERSION:
        raise StateError(f"this checkpoint has manifest version {saved['version']}; this release reads {VERSION}")
    # What must be there in any case is compared on loading. A distributed checkpoint has its tensors elsewhere.
    said = set(saved.get("state", ())) if "state_dict" in checkpoint else set()
    lost = sorted(said - state.keys() - owned_keys(model))
    if lost:
        raise StateError(
            f"the checkpoint lacks {', '.join(lost[:5])}, which it says it was saved with: something took it out of "
            "the file afterwards. Use the file that the Trainer wrote"
        )
    there = {entry["config"]["name"]: entry for entry in saved["methods"]}
    for name, entry in there.items():
        if name not in record.methods:
            if not entry.get("trains", True):
                for key in [k for k in state if is_adapter_key(k, name)]:
                    del state[key]
                continue
            raise StateError(
                f"the checkpoint holds a {entry['method']} named {name!r}, which this run does not attach; "
                f"attached are {list(record.methods)}"
            )
    for name, method in record.methods.items():
        kind = type(method).__name__
        if name not in there:
            if not is_trained(model, name):
                state.update(adapter_state(model, name))
                continue
            raise StateError(f"the checkpoint holds no {kind} named {name!r}; it holds {list(there)}")
        if there[name]["method"] != kind:
            raise StateError(f"{name!r} is a {there[name]['method']} in the checkpoint and a {kind} in this run")
        if there[name].get("copies", False) != has_overrides(model, name) and is_trained(model, name):
            ways = ["as a method", "by lp.load_adapter(..., trainable=True), with its own copy of heads and biases"]
            here, then = ways if there[name].get("copies") else ways[::-1]
            raise StateError(
                f"{name!r} was put in {then} in the run that saved this checkpoint, and {here} in this one: do as "
                "that run did, or make a checkpoint for a method of its directory (lightning-peft export, import)"
            )
        config, fixed = there[name]["config"], method.config().keys() - type(method).resume_may_differ
        for option in sorted(fixed & config.keys()):
            if config[option] != method.config()[option]:
                raise StateError(
                    f"{kind} {name!r} was saved with {option}={config[option]!r}, this run has "
                    f"{option}={method.config()[option]!r}"
                )
