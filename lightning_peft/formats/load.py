"""``lp.load_adapter``: an adapter directory, ours or Hugging Face PEFT's, onto a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lightning_peft.core.host import adapter_names, check_name, deactivate
from lightning_peft.core.inject import Plan, check_injectable, injected_name, put_in
from lightning_peft.core.state import check_fingerprint
from lightning_peft.formats.converter import Options, Reading, Tensors
from lightning_peft.formats.files import AdapterFiles, FormatError, read_files
from lightning_peft.formats.names import PREFIX, Base, base_for_keys
from lightning_peft.formats.registry import converter_for_type
from lightning_peft.formats.save import METADATA

__all__ = ["load_adapter"]


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str | None = None,
    trainable: bool = False,
    check_base: bool = True,
) -> list[str]:
    """Put the adapter of a directory, ours or Hugging Face PEFT's, into ``model``.

    The model is checked first and changed last: an error leaves it as it was.

    Args:
        model: any module that holds the base, a LightningModule or the bare model.
        directory: holds ``adapter_config.json``, or folders that do: then all of them are loaded.
        name: what to call the adapter; by default the name it was saved under, or ``"default"``.
        trainable: whether its parameters train.
        check_base: refuse an adapter that was trained on another base. A file of PEFT's own does not say.

    Returns:
        The names of the adapters.

    Raises:
        FormatError: a file or an option that cannot be read.
        StateError: the adapter was trained on another base.
        ValueError: the model has an adapter of that name.
    """
    files = read_files(directory)
    root = model.get_submodule(injected_name(model))
    facts = json.loads(files.metadata.get(METADATA, "{}"))
    name = name or facts.get("config", {}).get("name", "default")
    check_name(name)
    base = base_for_keys(root, [key.removeprefix(PREFIX) for key in files.tensors])
    if check_base and "fingerprint" in facts:
        check_fingerprint(base.module, facts["fingerprint"])
    reading = _read(files, base, name)
    check_injectable(root)
    plan = reading.method.plan(root)
    _fill(plan, reading, base)
    others = adapter_names(root)
    put_in(root, {name: (reading.method, plan)})
    if not trainable:
        for _, _, adapter, _ in plan.attach:
            adapter.requires_grad_(False)
    if others:
        deactivate(root, name)
    return [name]


def _read(files: AdapterFiles, base: Base, name: str) -> Reading:
    options, tensors = Options(files.config), Tensors(files.tensors)
    reading = converter_for_type(options.get("peft_type")).read(options, tensors, base, name)
    options.done()
    tensors.done()
    return reading


@torch.no_grad()
def _fill(plan: Plan, reading: Reading, base: Base) -> None:
    """Give the adapters of a plan the values that were read."""
    left = {base.outer(name): tensors for name, tensors in reading.tensors.items()}
    for host, _, adapter, _ in plan.attach:
        for name, part in {p.site_name: p for p in adapter.weights().values()}.items() or {host: adapter}.items():
            part.load_state_dict(left.pop(name), strict=False)
    if left:
        raise FormatError(f"no adapter takes {sorted(left)}")
