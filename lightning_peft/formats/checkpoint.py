"""Adapter directories from a Lightning checkpoint alone, without the model; and a checkpoint from a directory.

A checkpoint holds the trained tensors, and in its manifest where each adapter is, on what kind of layer, and what the
base is called. That is what most directories are made of.
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


def export_checkpoint(path: str | Path, directory: str | Path, name: str | None = None, **options: Any) -> list[str]:
    """Write the adapters of a checkpoint as adapter directories.

    Args:
        path: a checkpoint of a run with methods attached.
        directory: where to; several adapters go into folders of their names inside it.
        name: one adapter; by default all of them.
        **options: of the format, see :func:`lightning_peft.save_adapter`.

    Returns:
        The names of the adapters.

    Raises:
        StateError: it is no checkpoint of such a run, or has no adapter of that name.
        FormatError: the base itself has to be looked at.
    """
    with naming(path):
        return _export(read_checkpoint(path), path, directory, name, **options)


def _export(checkpoint: Mapping[str, Any], path: Any, directory: Any, name: str | None, **options: Any) -> list[str]:
    manifest = checkpoint[KEY]
    if "base" not in manifest:
        raise FormatError(f"{path} was saved by an earlier release, and does not say enough: give --model")
    entries = {entry["config"]["name"]: entry for entry in manifest["methods"]}
    if name is not None and name not in entries:
        raise StateError(f"no adapter named {name!r} in {path}; it has {list(entries)}")
    state = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    for entry in entries.values():  # heads' names become patterns of PEFT's, which are looked for in the base
        check_regexes(
            {"modules_to_save": entry["own"]["modules"], "config": entry["config"]}, manifest["base"]["modules"]
        )
    snapshots = {each: _snapshot(each, entries[each], manifest, state) for each in ([name] if name else entries)}
    for snapshot in snapshots.values():
        snapshot.metrics = scores(checkpoint)
    try:
        write_snapshots(snapshots, directory, **options)
    except (AttributeError, KeyError, StopIteration) as error:  # a converter that looks at the base's own code
        raise FormatError(f"this method's directory needs the base itself: give --model ({error!r})") from error
    return list(snapshots)


@torch.no_grad()
def import_checkpoint(
    module: L.LightningModule,
    directory: str | Path,
    name: str | None = None,
    check_base: bool = True,
    ignore_options: Collection[str] = (),
) -> dict[str, Any]:
    """The checkpoint that a run would have saved which trained the adapter of ``directory`` in ``module``.

    Heads and biases are the module's own in it, as in training. The epoch and the step are 0, and no optimizer has a
    state.

    Args:
        module: built, without adapters; it gets this one.
        directory: an adapter directory.
        name: what to call the adapter; by default what it was called.
        check_base: refuse an adapter that was trained on another base.
        ignore_options: unknown options to leave out.

    Raises:
        FormatError, StateError: see :func:`lightning_peft.load_adapter`; a head of another size than the module's.
    """
    files = read_files(directory)
    name = name or saved_name(files)
    with naming(directory):
        method, plan, own = read_plan(module, files, name, check_base, ignore_options)
    state = module.state_dict()
    for key, value in own.items():
        if value.shape != state[key].shape:
            raise FormatError(
                f"{key!r} is {tuple(value.shape)} in the file and {tuple(state[key].shape)} in the module"
            )
    install(module, {name: (method, plan)})
    nn.Module.load_state_dict(module, own, strict=False)
    trained = adapter_state(module)
    if lost := sorted(own.keys() - trained.keys()):
        raise FormatError(f"the file changes {lost[:3]} of the base, which no {type(method).__name__} trains")
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
        fingerprint={"values": {_inner(base, n): v for n, v in values.items()}},
        origin=entry.get("origin", {}),
    )


def _inner(base: Base, name: str) -> str:
    inner = base.inner(name)
    return name if inner is None else inner


def _tensors_of(
    part: AdapterRecord, records: list[AdapterRecord], name: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The part's tensors; those of several weights of one module stand under the weights' names."""
    prefix = adapter_key(part.host, name) + "."
    if sum(other.host == part.host for other in records) > 1 or part.parameter not in ("", "weight"):
        key = part.parameter.removesuffix(".weight")
        prefix += f"{key}." if any(k.startswith(f"{prefix}{key}.") for k in state) else f"{key}_."
    found = {key.removeprefix(prefix): gather_to_cpu(value) for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if not key.startswith("replacement.")}


def _trained(name: str, entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the method trained of the base: in the base itself, or as copies of its own."""
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
    """A base of which only names and the kinds of adapted layers are known."""

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
    """A layer of that kind and size on the meta device, which takes no memory."""
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
