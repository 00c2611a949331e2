"""Load an adapted model from a checkpoint, or from an adapter directory and its base."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import lightning_peft as lp
from lightning_peft.cli.module import build_module, load_module
from lightning_peft.core.adapters.lookup import adapter_names
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.formats.directory.facts import base_facts
from lightning_peft.formats.directory.files import CONFIG, adapter_folders, read_config, read_header
from lightning_peft.formats.load import saved_preparations
from lightning_peft.pretrained import NO_CODE, load_model, locate

__all__ = ["activate", "add_base_option", "load_adapted"]


def add_base_option(parser: ArgumentParser) -> None:
    """Add ``--base`` to a command that reads an adapter directory."""
    parser.add_argument(
        "--base",
        help="the base of an adapter directory: 'demo', a folder, or a hub id; default: the base that it names",
    )


def load_adapted(source: Path, name: str | None, arguments: Mapping[str, Any], base: str | None = None) -> nn.Module:
    """Load a model with its adapters.

    Args:
        source: a checkpoint or an adapter directory.
        name: the class of the trained module, as for :func:`lightning_peft.cli.module.load_module`.
        arguments: arguments of the class.
        base: the base of an adapter directory; None for the one that it names.

    Raises:
        StateError: if the source cannot be read or built.
    """
    if not source.is_dir():
        return load_module(source, name, dict(arguments))
    if (source / "meta.pt").is_file():
        raise StateError(f"{source} is a sharded checkpoint: save one file with a full state dict")
    if base is not None and name is not None:
        raise StateError("--base and --model both name the base of the adapter: pass only one of them")
    model: nn.Module = _base(source, base) if name is None else build_module(name, arguments)
    for step in saved_preparations(source):
        lp.apply(model, step)
    lp.load_adapter(model, source)
    return model


def activate(model: nn.Module, name: str, source: Path) -> None:
    """Activate one adapter.

    Raises:
        StateError: if the model has no adapter of that name.
    """
    if name not in adapter_names(model):
        raise StateError(f"no adapter named {name!r}; {source} has {list(adapter_names(model))}")
    lp.set_active(model, name)


def _base(directory: Path, base: str | None) -> nn.Module:
    import transformers

    folder = adapter_folders(directory)[0] if not (directory / CONFIG).exists() else directory
    where = base or read_config(folder).get("base_model_name_or_path")
    if not where:
        raise StateError(f"{directory} does not name its base: add --base path/to/base, or --model my.Module")
    # The class that was trained. The class in config.json may have a different head, such as a masked language model's.
    facts = base_facts(read_header(folder)[1], folder)
    trained, labels = facts.get("base"), facts.get("labels") or []
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        if labels
        else {}
    )
    [architecture] = transformers.AutoConfig.from_pretrained(locate(where), **NO_CODE).architectures or [None]
    for candidate in (trained, architecture):
        found = getattr(transformers, str(candidate), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return load_model(found, where, pretrained=True, dtype=None, **names)
    raise StateError(
        f"the config.json of {where} does not name a model class of transformers: pass the class with --model"
    )
