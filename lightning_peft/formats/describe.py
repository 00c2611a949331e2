"""Describe an adapter directory or a checkpoint without a model and without reading tensor values."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_peft.core.names import is_adapter_key
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory.facts import base_facts
from lightning_peft.formats.directory.files import TensorInfo, adapter_folders, read_config, read_header
from lightning_peft.trainer.checkpoints.manifest import KEY, read_checkpoint, scores

__all__ = ["AdapterSummary", "Description", "describe"]

#: options of our methods and of PEFT that are shown if the configuration has them
_SHOWN = (
    *("r", "init_r", "target_r", "alpha", "lora_alpha", "bottleneck_size", "num_virtual_tokens", "oft_block_size"),
    *("block_size", "targets", "target_modules", "trainable", "modules_to_save"),
)


#: types that have a converter, so that describing them does not import the converters, which need Lightning
READABLE = frozenset(
    {
        *("ADALORA", "HIRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PREFIX_TUNING"),
        *("PROMPT_TUNING", "P_TUNING", "VERA", "LIGHTNING_PEFT"),
    }
)


@dataclass
class AdapterSummary:
    """The description of one adapter, as read from its files.

    Attributes:
        name: The adapter's name; empty for files written by PEFT, which do not store one.
        method: The method's class name, or PEFT's ``peft_type``.
        made_by: ``"lightning_peft"`` or ``"peft"``.
        config: All options.
        base: The base model's name, if the files have it.
        tensors: Dtype and shape of each tensor, by name in the file.
        metrics: Metrics of the run that trained it, if the files have them.
        note: The reason why the adapter cannot be loaded; empty if it can.
    """

    name: str
    method: str
    made_by: str
    config: dict[str, Any]
    base: str | None
    tensors: dict[str, TensorInfo]
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def parameters(self) -> int:
        """The number of values in the file."""
        return sum(t.numel for t in self.tensors.values())


@dataclass
class Description:
    """The description of an adapter directory or a checkpoint; prints as a table.

    Attributes:
        path: The directory or the file.
        kind: ``"adapter"``, ``"2 adapters"`` or ``"checkpoint"``.
        size: Size on disk, in bytes.
        adapters: The adapters in it, at least one.
        facts: Facts about a whole checkpoint: epoch and step, parameter counts, metrics.
    """

    path: Path
    kind: str
    size: int
    adapters: list[AdapterSummary]
    facts: dict[str, Any] = field(default_factory=dict)

    def __rich__(self) -> Table:
        # rich would interpret markup in plain strings. Text shows a file's strings as they are.
        title = _text(f"{self.path}: {self.kind}, {_bytes(self.size)}")
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column("what", no_wrap=True)
        table.add_column("is", overflow="fold")
        for key, value in self.facts.items():
            table.add_row(_text(key), _text(value))
        for adapter in self.adapters:
            table.add_section()
            for key, value in _rows(adapter).items():
                table.add_row(_text(key), _text(value))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue()


def describe(path: str | Path) -> Description:
    """Describe an adapter directory (with one or several adapters) or a checkpoint.

    No code from the files runs, and no model is needed.

    Args:
        path: A ``.ckpt`` file, or a directory that has ``adapter_config.json`` or subdirectories with one.

    Raises:
        FormatError: if the directory has no adapter, or its files are malformed.
        StateError: if the file is not a checkpoint of a run with methods attached, or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"there is no file or directory {path}")
    if path.is_dir() and not (path / "meta.pt").is_file():
        folders = adapter_folders(path)
        found = [_adapter(folder) for folder in folders]
        size = sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file())
        return Description(path, "adapter" if len(found) == 1 else f"{len(found)} adapters", size, found)
    try:
        return _checkpoint(path)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise StateError(
            f"cannot read the run information in {path}: {error!r}. The manifest is damaged or was edited: use another "
            "copy of the file"
        ) from error


def _adapter(folder: Path) -> AdapterSummary:
    config, (tensors, metadata) = read_config(folder), read_header(folder)
    facts = base_facts(metadata, folder)
    return AdapterSummary(
        name=str(facts.get("config", {}).get("name", "")),
        method=str(facts.get("method", config["peft_type"])),
        made_by="lightning_peft" if facts else "peft",
        config=facts.get("config") or config,
        base=config.get("base_model_name_or_path"),
        tensors=tensors,
        metrics=facts.get("metrics") or {},
        note=_why_not_loaded(config["peft_type"]),
    )


def _why_not_loaded(peft_type: str) -> str:
    """The reason why an adapter of this type cannot be loaded; empty if it can."""
    if peft_type in READABLE:
        return ""
    from lightning_peft.formats.registry import converter_for_type

    try:
        converter_for_type(peft_type)
    except FormatError as error:
        return str(error)
    return ""


def _checkpoint(path: Path) -> Description:
    sharded = path.is_dir()
    checkpoint = read_checkpoint(path / "meta.pt" if sharded else path, mmap=not sharded)
    manifest = checkpoint[KEY]
    hyper = checkpoint.get("hyper_parameters") or {}
    base = next((hyper[key] for key in ("model", "network") if isinstance(hyper.get(key), str)), None)
    state = _sharded_state(path) if sharded else {k: (v.dtype, v.shape) for k, v in checkpoint["state_dict"].items()}
    tensors = {k: TensorInfo(str(dtype).removeprefix("torch."), tuple(shape)) for k, (dtype, shape) in state.items()}
    adapters = []
    for entry in manifest["methods"]:
        name = entry["config"]["name"]
        own = {key: info for key, info in tensors.items() if is_adapter_key(key, name)}
        adapters.append(AdapterSummary(name, entry["method"], "lightning_peft", entry["config"], base, own))
    rest = sum(info.numel for key, info in tensors.items() if not any(key in a.tensors for a in adapters))
    facts = {
        "epoch, step": f"{checkpoint.get('epoch')}, {checkpoint.get('global_step')}",
        "trains": f"{manifest['trainable']:,} of {manifest['total']:,} parameters",
    }
    if rest:
        facts["of the base's own"] = f"{rest:,} values (heads and other parts that train in full)"
    for key, value in scores(checkpoint).items():
        facts[key] = f"{value:.6g}"
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if sharded else path.stat().st_size
    return Description(path, "checkpoint", size, adapters, facts)


def _sharded_state(path: Path) -> dict[str, tuple[Any, Any]]:
    """Dtypes and shapes of the tensors in a distributed checkpoint."""
    from lightning_peft.trainer.checkpoints.distributed_files import check_metadata

    stored = check_metadata(path).state_dict_metadata.items()
    found = {key.removeprefix("state_dict."): info for key, info in stored if key.startswith("state_dict.")}
    return {key: (info.properties.dtype, info.size) for key, info in found.items()}


def _rows(adapter: AdapterSummary) -> dict[str, Any]:
    kinds = Counter(info.dtype for info in adapter.tensors.values())
    rows: dict[str, Any] = {
        "name": adapter.name or "(none: PEFT does not store one)",
        "method": adapter.method,
        "made by": {"peft": "Hugging Face PEFT"}.get(adapter.made_by, adapter.made_by),
        "base": adapter.base or "(unknown)",
        "parameters": f"{adapter.parameters:,} in {len(adapter.tensors)} tensors"
        + "".join(f", {count} {dtype}" for dtype, count in kinds.items()),
    }
    rows |= {key: adapter.config[key] for key in _SHOWN if adapter.config.get(key) not in (None, [], {}, "")}
    rows |= {key: f"{value:.6g}" for key, value in adapter.metrics.items() if isinstance(value, int | float)}
    return {**rows, "cannot be loaded": adapter.note} if adapter.note else rows


def _text(value: Any) -> Text:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text if len(text) <= 400 else f"{text[:400]} ..."
    # A control character in a file could move the terminal's cursor and overwrite what was printed.
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _bytes(size: int) -> str:
    power = min(3, int(math.log(max(size, 1), 1000)))
    return f"{size:,} bytes" if not power else f"{size / 1000**power:.3g} {('', 'kB', 'MB', 'GB')[power]}"
