"""The arguments ``--retention.data`` and so on, from which commands build :class:`lightning_peft.Retention`."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import yaml

import lightning_peft as lp
from lightning_peft.pretrained import InputError
from lightning_peft.trainer.retention import ForwardFn, build_data

__all__ = ["add_retention_options", "retention_maker"]


def add_retention_options(parser: ArgumentParser) -> None:
    """Add ``--retention.data`` and the other arguments to a command."""
    add = parser.add_argument
    add(
        "--retention.data",
        metavar="DATA",
        help="held-back data like those that the base was trained on, to measure forgetting: a text file, "
        "or class_path and init_args of a DataModule, in a YAML file or inline",
    )
    add("--retention.batches", type=int, default=16, help="batches to measure; default: %(default)s")
    add("--retention.distance", choices=["kl", "cosine"], default="kl", help="default: %(default)s")
    add("--retention.forward_fn", metavar="FUNCTION", help="import path of a function of module and batch")


def retention_maker(options: Namespace) -> Callable[[], lp.Retention] | None:
    """Return a function that creates the callback; None without ``--retention.data``.

    Raises:
        InputError: if the data or the function cannot be built.
    """
    given = {name.partition(".")[2]: v for name, v in vars(options).items() if name.startswith("retention.")}
    data, forward_fn = given["data"], given["forward_fn"]
    if data is None:
        return None
    if Path(data).suffix in (".txt", ".csv", ".tsv", ".jsonl", ".parquet"):
        data = {"class_path": "LanguageModelData", "init_args": {"source": data, "validation": data, "batch_size": 8}}
    try:
        if isinstance(data, str):
            text = Path(data).read_text() if Path(data).suffix in (".yaml", ".yml") else data
            data = yaml.safe_load(text)
        function = None if forward_fn is None else _imported(forward_fn)
        build_data(data)
    except (ValueError, TypeError, ImportError, AttributeError, OSError, yaml.YAMLError) as error:
        raise InputError(f"--retention.data {given['data']} cannot be built: {error}") from error
    return lambda: lp.Retention(
        data,
        batches=given["batches"],
        distance=given["distance"],
        forward_fn=function,
        every_n_validations=sys.maxsize,  # only at the end of the training
    )


def _imported(path: str) -> ForwardFn:
    module, _, name = path.rpartition(".")
    found: ForwardFn = getattr(importlib.import_module(module), name)
    return found
