"""The manifest: what a checkpoint says of the methods that made it, in plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.core.inject import Injection, injection_of
from lightning_peft.core.state import StateError
from lightning_peft.core.thaw import thawed

__all__ = ["KEY", "check_manifest", "manifest"]

KEY = "lightning_peft"
VERSION = 1


def manifest(model: nn.Module) -> dict[str, Any]:
    """Methods with their configuration, the base's fingerprint and the counts, of an adapted model."""
    record = injection_of(model)
    assert record is not None
    return {
        "version": VERSION,
        "methods": [{"method": type(method).__name__, "config": method.config()} for method in record.methods.values()],
        "fingerprint": record.fingerprint,
        "thawed": thawed(model),
        "trainable": record.report.trainable,
        "total": record.report.total,
    }


def check_manifest(record: Injection, checkpoint: Mapping[str, Any]) -> None:
    """Compare the methods that made a checkpoint with those attached now.

    Raises:
        StateError: no manifest; another version; a method missing, added or of another configuration.
    """
    saved = checkpoint.get(KEY)
    if saved is None:
        raise StateError(
            "this checkpoint was saved without adapters: it has no 'lightning_peft' manifest. To start from its "
            "weights, load them in your module (torch.load and load_state_dict); ckpt_path= resumes an adapted run"
        )
    if saved["version"] > VERSION:
        raise StateError(f"this checkpoint has manifest version {saved['version']}; this release reads {VERSION}")
    there = {entry["config"]["name"]: entry for entry in saved["methods"]}
    for name, entry in there.items():
        if name not in record.methods:
            raise StateError(
                f"the checkpoint holds a {entry['method']} named {name!r}, which this run does not attach; "
                f"attached are {list(record.methods)}"
            )
    for name, method in record.methods.items():
        kind = type(method).__name__
        if name not in there:
            raise StateError(f"the checkpoint holds no {kind} named {name!r}; it holds {list(there)}")
        if there[name]["method"] != kind:
            raise StateError(f"{name!r} is a {there[name]['method']} in the checkpoint and a {kind} in this run")
        config, fixed = there[name]["config"], method.config().keys() - type(method).may_change
        for option in sorted(fixed & config.keys()):
            if config[option] != method.config()[option]:
                raise StateError(
                    f"{kind} {name!r} was saved with {option}={config[option]!r}, this run has "
                    f"{option}={method.config()[option]!r}"
                )
