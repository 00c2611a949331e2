"""The arguments ``--retention.data`` and so on, from which commands build :class:`lightning_peft.Retention`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import yaml

import lightning_peft as lp
from lightning_peft.pretrained import InputError

__all__ = ["add_retention_options", "retention_maker"]


def add_retention_options(parser: ArgumentParser) -> None:
    """Add ``--retention.data`` and the other arguments to a command."""
    add = parser.add_argument
    add(
        "--retention.data",
        metavar="DATA",
        help="held-back data of the base's own kind, to measure forgetting: a text file, or class_path and init_args "
        "of a DataModule, in a YAML file or inline",
    )
    add("--retention.batches", type=int, default=16, help="batches to measure; default: %(default)s")
    add("--retention.distance", choices=["kl", "cosine"], default="kl", help="default: %(default)s")
    add("--retention.forward_fn", metavar="FUNCTION", help="import path of a function of module and batch")


def retention_maker(options: Namespace) -> Callable[[], lp.Retention] | None:
    """Return a function that creates the callback; None without ``--retention.data``.

    Raises:
        InputError: the data or the function cannot be built.
    """
    given = {name.partition(".")[2]: v for name, v in vars(options).items() if name.startswith("retention.")}
    data, forward_fn = given["data"], given["forward_fn"]
    if data is None:
        return None
    if Path(data).suffix in (".txt", ".csv", ".tsv", ".jsonl", ".parquet"):
        data = {"class_path": "LanguageModelData", "init_args": {"source": data, "validation": data, "batch_size": 8}}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=L.LightningDataModule)
    parser.add_argument("--forward_fn", type=Callable | None)
    try:
        if isinstance(data, str) and Path(data).suffix in (".yaml", ".yml"):
            data = yaml.safe_load(Path(data).read_text())
        elif isinstance(data, str):
            data = yaml.safe_load(data)  # inline
        parsed = parser.parse_object({"data": data, "forward_fn": forward_fn})
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"--retention.data {given['data']} cannot be built: {error}") from error

    def make() -> lp.Retention:
        built: Any = parser.instantiate_classes(parsed)
        return lp.Retention(
            built.data, batches=given["batches"], distance=given["distance"], forward_fn=built.forward_fn
        )

    return make
