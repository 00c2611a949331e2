"""Export adapter directories from a Lightning checkpoint without the model, and import a directory as a checkpoint.

A checkpoint holds the trained tensors. Its manifest says where each adapter is, what kind of layer it adapts, and what
the base is called. This is enough to write the directory of most methods.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core.injection.apply import install
from lightning_peft.core.names import adapter_key, is_within, join
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.state.adapter_records import AdapterRecord, adapted_names, gather_to_cpu
from lightning_peft.core.state.fingerprint import fingerprint_now
from lightning_peft.core.state.state_dict import StateError, adapter_state
from lightning_peft.core.state.torch_file import naming
from lightning_peft.core.targeting.base_model import Base
from lightning_peft.core.untrusted import FormatError, check_regexes
from lightning_peft.formats.directory.files import read_files
from lightning_peft.formats.directory.snapshot import Snapshot
from lightning_peft.formats.load import read_plan, saved_name
from lightning_peft.formats.save import write_snapshots
from lightning_peft.trainer.checkpoints.manifest import KEY, manifest, read_checkpoint, scores, sealed
from lightning_peft.trainer.module import adapt_module

__all__ = ["export_checkpoint", "import_checkpoint"]


def export_checkpoint(
    path: str | Path, directory: str | Path, name: str | None = None, *, fold_scale: bool = False
) -> list[str]:
    """Write the adapters of a checkpoint as adapter directories.

    Args:
        path: A checkpoint of a run with methods attached.
        directory: The output directory. Several adapters are written to subdirectories with their names.
        name: The adapter to export; by default all of them.
        fold_scale: Multiply LoRA's B by the scale, for tools that ignore alpha and rsLoRA.

    Returns:
        The names of the exported adapters.

    Raises:
        StateError: if the file is not a checkpoint of such a run, or has no adapter called ``name``.
        FormatError: if the directory cannot be written without the base model itself.
    """
    with naming(path):
        return _export(read_checkpoint(path), path, directory, name, fold_scale)


def _export(checkpoint: Mapping[str, Any], path: Any, directory: Any, name: str | None, fold_scale: bool) -> list[str]:
    manifest = checkpoint[KEY]
    if "base" not in manifest:
        raise FormatError(
            f"{path} was saved by an earlier release, whose manifest does not describe the base: pass --model"
        )
    entries = {entry["config"]["name"]: entry for entry in manifest["methods"]}
    if name is not None and name not in entries:
        raise StateError(f"no adapter named {name!r} in {path}; it has {list(entries)}")
    state = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    # These names become patterns that are matched against every module name, so a file must not choose a slow regex.
    for entry in entries.values():
        check_regexes(
            {"modules_to_save": entry["own"]["modules"], "config": entry["config"]}, manifest["base"]["modules"]
        )
    snapshots = {each: _snapshot(each, entries[each], manifest, state) for each in ([name] if name else entries)}
    for snapshot in snapshots.values():
        snapshot.metrics = scores(checkpoint)
    try:
        write_snapshots(snapshots, directory, fold_scale)
    # The outline has names and layer kinds only. A converter that reads more of the base fails with one of these.
    except (AttributeError, KeyError, StopIteration) as error:
        raise FormatError(
            "the directory of this method cannot be written from the checkpoint alone, because it depends on the base "
            f"model: pass --model ({error!r})"
        ) from error
    return list(snapshots)


@torch.no_grad()
def import_checkpoint(
    module: L.LightningModule,
    directory: str | Path,
    name: str | None = None,
    check_base: bool = True,
    ignore_options: Collection[str] = (),
) -> dict[str, Any]:
    """Return a checkpoint like that of a run that trained the adapter in ``directory`` on ``module``.

    As in training, heads and biases are stored as the module's own parameters, not as overrides. Epoch and step are 0,
    and there is no optimizer state.

    Args:
        module: The built module, without adapters; the adapter is attached to it.
        directory: An adapter directory.
        name: The adapter's name; by default the name it was saved under.
        check_base: Refuse an adapter that was trained on another base.
        ignore_options: Names of unknown options to ignore.

    Raises:
        FormatError: as :func:`lightning_peft.load_adapter`, or if the size of a head differs from the module's.
        StateError: as :func:`lightning_peft.load_adapter`.
    """
    files = read_files(directory)
    name = name or saved_name(files)
    with naming(directory):
        method, plan, own = read_plan(module, files, name, check_base, ignore_options)
    state = module.state_dict()
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise FormatError(
                f"{key!r} has shape {tuple(value.shape)} in the file but {tuple(state[key].shape)} in the module: "
                "build the module with the same number of outputs"
            )
    install(module, {name: (method, plan)})
    nn.Module.load_state_dict(module, own, strict=False)
    trained = adapter_state(module)
    if lost := sorted(own.keys() - trained.keys()):
        raise FormatError(
            f"the file changes {lost[:3]} of the base, which {type(method).__name__} does not train, so a checkpoint "
            "would not hold it: load the directory with lp.load_adapter"
        )
    adapt_module(module)
    return {
        "state_dict": trained,
        KEY: sealed(manifest(module), trained),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": L.__version__,
        "epoch": 0,
        "global_step": 0,
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }


def _snapshot(name: str, entry: Mapping[str, Any], manifest: Mapping[str, Any], state: dict[str, Tensor]) -> Snapshot:
    everywhere = [AdapterRecord(**part) for e in manifest["methods"] for part in e["parts"]]
    base = _Outline.of(manifest["base"], everywhere)
    values = fingerprint_now(manifest["fingerprint"], state, adapted_names(everywhere))["values"]
    records = [AdapterRecord(**part) for part in entry["parts"]]
    for part in records:
        part.tensors = _tensors_of(part, records, name, state)
        part.host = _inner(base, part.host)
    own = entry["own"]
    heads = [_inner(base, head) for head in own["modules"]]
    return Snapshot(
        method=method_of_file(entry["method"], entry["config"]),
        adapter_records=records,
        heads=heads,
        trained={_inner(base, key): gather_to_cpu(value) for key, value in _trained(name, entry, state).items()},
        base=base,
        fingerprint={
            "values": {_inner(base, n): v for n, v in values.items()},
            "packed": manifest["fingerprint"].get("packed", {}),
            "prepared": manifest["fingerprint"].get("prepared", []),
        },
        origin=entry.get("origin", {}),
    )


def _inner(base: Base, name: str) -> str:
    inner = base.inner(name)
    return name if inner is None else inner


def _tensors_of(
    part: AdapterRecord, records: list[AdapterRecord], name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one adapter record, by name inside the adapter.

    If a module has several adapted weights, the checkpoint's keys contain the weight's name too.
    """
    prefix = adapter_key(part.host, name) + "."
    if sum(other.host == part.host for other in records) > 1 or part.parameter not in ("", "weight"):
        key = part.parameter.removesuffix(".weight")
        prefix += f"{key}." if any(k.startswith(f"{prefix}{key}.") for k in state) else f"{key}_."
    found = {key.removeprefix(prefix): gather_to_cpu(value) for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if not key.startswith("replacement.")}


def _trained(name: str, entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the base that the method trained, in place or as overrides (keys with ``replacement.``)."""
    own, base, copies = entry["own"], {}, {}
    adapted = {part["host"] for part in entry["parts"]}
    for key, value in state.items():
        host, _, inside = key.partition(f".adapters.{name}.")
        if inside.startswith("replacement."):
            copies[f"{host}.{inside.removeprefix('replacement.')}"] = value
        elif inside and host not in adapted:
            copies[f"{host}.{inside}"] = value
        elif key in own["parameters"] or is_within(key, *own["modules"]):
            base[key] = value
    return base | copies


class _Outline(Base):
    """A stand-in for the base, built from the names and layer kinds in a manifest."""

    _facts: dict[str, Any]

    @classmethod
    def of(cls, facts: Mapping[str, Any], records: list[AdapterRecord]) -> _Outline:
        root = nn.Module()
        for name in facts["modules"]:
            _put(root, join(facts["name"], name), nn.Module())
        for part in records:
            _put(root, part.host, _layer(part, records))
        outline = cls(root, facts["name"])
        object.__setattr__(outline, "_facts", dict(facts))
        outline.module.config = SimpleNamespace(tie_word_embeddings=facts["tied"])  # type: ignore[assignment]
        return outline

    def facts(self) -> dict[str, Any]:
        return self._facts


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, parts = root, name.split(".")
    for part in parts[:-1]:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    owner.add_module(parts[-1], module)


def _layer(part: AdapterRecord, records: list[AdapterRecord]) -> nn.Module:
    """A layer of the record's kind and size on the meta device, which allocates no memory."""
    shape = part.shape
    if part.kind == "Linear":
        return nn.Linear(shape[1], shape[0], bias=False, device="meta")
    if part.kind == "Embedding":
        return nn.Embedding(shape[0], shape[1], device="meta")
    if part.kind == "Attention":
        return nn.MultiheadAttention(shape[1], 1, device="meta")
    module = nn.Module()
    for other in records:
        if other.host == part.host and other.parameter:
            module.register_parameter(other.parameter, nn.Parameter(torch.empty(other.shape, device="meta")))
    return module
