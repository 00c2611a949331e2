"""The files of an adapter directory, read and written safely.

A directory holds ``adapter_config.json`` (what the adapter is), ``adapter_model.safetensors`` (its tensors, with
metadata in the header) and often a ``README.md``. All of it is data: nothing that a file names is imported, nothing
in it is run, and all that it declares is held against its real size before memory is asked for.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft.core.names import nearest
from lightning_peft.core.untrusted import FormatError, parse_json
from lightning_peft.formats.directory.seal import check_tensors, seal
from lightning_peft.ops.finite import is_finite

__all__ = [
    "CARD",
    "CONFIG",
    "WEIGHTS",
    "AdapterFiles",
    "TensorInfo",
    "adapter_folders",
    "check_content",
    "json_text",
    "read_config",
    "read_files",
    "read_header",
    "write_files",
]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
MAX_JSON = 16 * 2**20  #: bytes of a configuration, or of the header of a tensor file
MAX_KEY = 1024  #: characters of a tensor's name
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass
class AdapterFiles:
    """An adapter as its files hold it.

    Attributes:
        directory: where they are.
        config: ``adapter_config.json``.
        tensors: by the names in the file, on the CPU.
        metadata: of the tensor file's header.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass
class TensorInfo:
    """What the header of a tensor file says of one tensor: its safetensors type, such as ``F32``, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def adapter_folders(directory: str | Path) -> list[Path]:
    """The adapters in ``directory``: itself, where it holds one, and the folders in it that do.

    Raises:
        FormatError: there is none.
    """
    directory = _folder(directory)
    inside = sorted(p for p in directory.iterdir() if (p / CONFIG).is_file() and not p.name.startswith("."))
    for folder in inside:
        _stays_inside(folder, directory)
    found = [directory] * (directory / CONFIG).is_file() + inside
    if not found:
        raise FormatError(f"{directory} has no {CONFIG}, nor has a folder in it: {_contents(directory)}")
    return found


def read_files(directory: str | Path) -> AdapterFiles:
    """Read the adapter in ``directory``.

    Args:
        directory: of this package or of Hugging Face PEFT, in its cache as well (whose files are symbolic links).

    Raises:
        FormatError: a file is missing, is no plain data of that kind, declares what it does not hold, or holds names
            or values that no adapter has.
    """
    directory = _folder(directory)
    config = read_config(directory)
    header, metadata = read_header(directory)
    path = directory / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if tensors.keys() != header.keys():
        raise FormatError(f"{path} changed while it was read")
    _check_tensors(tensors, str(path), config)
    check_tensors(tensors, metadata, str(directory))
    return AdapterFiles(directory, config, tensors, metadata)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` alone.

    Raises:
        FormatError: it is missing, no JSON object, too large, too deep, or names no ``peft_type``.
    """
    path = _file(_folder(directory), CONFIG)
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {MAX_JSON:,}")
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path} names no method: peft_type is {config.get('peft_type')!r}, not a string")
    return config


def read_header(directory: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read what ``adapter_model.safetensors`` holds, without its values: tensors by name, and the metadata.

    Raises:
        FormatError: it is missing or no safetensors file; a name or size in it is impossible.
    """
    path = _file(_folder(directory), WEIGHTS)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FormatError(f"{path} is no safetensors file, or is cut off: it has {size:,} bytes")
        if length > MAX_JSON:
            raise FormatError(f"{path} has a header of {length:,} bytes; at most {MAX_JSON:,} are read")
        header = parse_json(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must hold strings")
    tensors, at = {}, 0
    ranges = []
    for key, entry in header.items():
        tensors[key], begin, end = _entry(key, entry, path)
        ranges.append((begin, end, key))
    for begin, end, key in sorted(ranges):
        if begin != at:
            raise FormatError(f"{path}: {key!r} begins at byte {begin:,}, where {at:,} was expected")
        at = end
    if at != size - 8 - length:
        raise FormatError(f"{path} declares {at:,} bytes of tensors and holds {size - 8 - length:,}")
    return tensors, metadata


def write_files(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    card: str | None,
) -> None:
    """Write an adapter into ``directory``: all files or, on any error, none.

    They are first written beside it, then moved. Whoever reads a directory that is being replaced, or that the end
    of the process left half replaced, finds no configuration in it rather than files of two adapters; other files
    in it stay.

    Args:
        directory: created with its parents.
        config: of plain values; names the ``peft_type``.
        tensors: by the names they get in the file.
        metadata: of the tensor file's header.
        card: the text of ``README.md``; None leaves one that is there.

    Raises:
        FormatError: ``directory`` is a file, or the adapter is one that could not be read again (no tensors, a tensor
            that is empty or not finite, a name that is none, a configuration that is no JSON).
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise FormatError(f"{directory} is a file; an adapter is saved as a directory")
    text = check_content(config, tensors)
    # Inside of a directory that exists: it may be a mount, out of which nothing can be moved in one step.
    beside = (directory if directory.exists() else directory.parent) / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    beside.mkdir(parents=True)
    try:
        own = _unshared(tensors)
        save_file(own, beside / WEIGHTS, seal(json.loads(text), own, {"format": "pt", **metadata}))
        (beside / CONFIG).write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (beside / CARD).write_text(card, encoding="utf-8")
        read_config(beside), read_header(beside)
        for file in beside.iterdir():
            _to_disk(file)
        if beside.parent == directory:
            _replace(directory, beside)
        else:
            beside.rename(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_content(config: Mapping[str, Any], tensors: Mapping[str, Tensor], values: bool = True) -> str:
    """The text of ``adapter_config.json``, of an adapter that can be written and read again.

    Args:
        config, tensors: see :func:`write_files`.
        values: whether to look at the tensors' values.

    Raises:
        FormatError: see :func:`write_files`.
    """
    text = json_text(config, indent=2, sort_keys=True)
    _check_tensors(tensors, "the adapter", config, values)
    return text


def json_text(value: Any, **options: Any) -> str:
    """``value`` as JSON.

    Raises:
        FormatError: it cannot be written as JSON.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"the configuration of this adapter is no JSON: {error}") from error


def _replace(directory: Path, beside: Path) -> None:
    """Move the files in ``beside`` over those in ``directory``; those go back if that fails."""
    new = [name for name in (CARD, WEIGHTS, CONFIG) if (beside / name).exists()]
    old = beside / "old"
    old.mkdir()
    try:
        for name in reversed(new):  # the configuration leaves first and comes last
            if os.path.lexists(directory / name):
                os.replace(directory / name, old / name)
        for name in new:
            os.replace(beside / name, directory / name)
    except BaseException:
        for name in new:
            if os.path.lexists(old / name):
                os.replace(old / name, directory / name)
            elif not (beside / name).exists():
                (directory / name).unlink()
        raise


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        pointer = own.untyped_storage().data_ptr()
        out[key] = own.clone() if pointer in seen else own
        seen.add(pointer)
    return out


def _folder(directory: str | Path) -> Path:
    path = Path(directory)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, beside, n=3)
        hub = f"of the Hub, download it first: huggingface_hub.snapshot_download({str(directory)!r})"
        hint = f"; near it: {', '.join(near)}" if near else f"; {hub}" if str(directory).count("/") == 1 else ""
        raise FormatError(f"there is no directory {path}{hint}")
    if not path.is_dir():
        hint = f"; `lightning-peft export {path} out/` makes one of a checkpoint" if path.suffix == ".ckpt" else ""
        raise FormatError(f"{path} is a file; an adapter is a directory with {CONFIG} and {WEIGHTS}{hint}")
    return path.resolve()


def _file(directory: Path, name: str) -> Path:
    """The path of a file in an adapter's directory, once it is known to be one, and to be in it."""
    path = directory / name
    if path.is_symlink() or path.exists():
        _stays_inside(path, directory)
        if not path.is_file():
            raise FormatError(f"{path} is no regular file")
        return path
    if name == WEIGHTS:
        if (directory / f"{WEIGHTS}.index.json").exists():
            raise FormatError(f"{directory} holds tensors in shards, as whole models are stored; adapters are one file")
        pickles = [p.name for p in sorted(directory.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise FormatError(
                f"{directory} holds {pickles[0]} and no {WEIGHTS}. That is a pickle, which can run any program when "
                "it is read, so it is not. If you trust it, load it where it was made and save it anew: "
                "PeftModel.from_pretrained(base, directory).save_pretrained(directory, safe_serialization=True)"
            )
    inside = sorted(p.parent.name for p in directory.glob(f"*/{name}"))
    hint = f"; the folders {', '.join(inside[:5])} in it have one each" if inside else f": {_contents(directory)}"
    raise FormatError(f"{directory} has no {name}{hint}")


def _contents(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    if "config.json" in names:
        return "it holds a whole model ('config.json'), which from_pretrained loads"
    return f"it holds {', '.join(map(repr, names[:6]))}" if names else "it is empty"


def _stays_inside(path: Path, directory: Path) -> None:
    """Refuse a symbolic link out of the directory, but for the one that Hugging Face's cache is made of.

    There ``<model>/snapshots/<revision>/<file>`` links to ``<model>/blobs/<digest>``.
    """
    target = path.resolve()
    snapshots = next((p for p in (directory, *directory.parents) if p.parent.name == "snapshots"), None)
    blobs = None if snapshots is None else snapshots.parent.parent / "blobs"
    if not target.is_relative_to(directory) and target.parent != blobs:
        raise FormatError(f"{path} is a symbolic link to {target}, outside of the adapter's directory")


def _entry(key: str, entry: Any, path: Path) -> tuple[TensorInfo, int, int]:
    """One tensor of a header, and where it begins and ends."""
    _check_key(key, str(path))

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= 16 and all(type(v) is int and 0 <= v < 2**63 for v in value)

    known = isinstance(entry, dict) and sizes(entry.get("shape")) and sizes(entry.get("data_offsets"))
    if not known or len(entry["data_offsets"]) != 2:
        raise FormatError(f"{path}: {key!r} is not described by a shape and two data_offsets: {str(entry)[:120]}")
    if entry.get("dtype") not in _BYTES:
        raise FormatError(f"{path}: {key!r} has the type {entry.get('dtype')!r}; known are {', '.join(_BYTES)}")
    info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if end - begin != info.numel * _BYTES[info.dtype]:
        raise FormatError(
            f"{path}: {key!r} is declared as {info.dtype} of shape {info.shape}, which takes "
            f"{info.numel * _BYTES[info.dtype]:,} bytes, and has {end - begin:,}"
        )
    return info, begin, end


def _check_key(key: str, where: str) -> None:
    if not key.isprintable() or "\\" in key or len(key) > MAX_KEY or not all(key.split(".")):
        shown = ascii(key[:80])
        raise FormatError(f"{where}: {shown} cannot name a tensor: expected words with '.' between, as in a state dict")


def _check_tensors(tensors: Mapping[str, Tensor], where: str, config: Mapping[str, Any], values: bool = True) -> None:
    """Refuse names that are none, and values that no trained adapter has."""
    if not tensors:
        raise FormatError(f"{where} holds no tensors")
    # PEFT's AdaLoRA stores a matrix that lost all of its ranks as an empty one.
    may_be_empty = config.get("peft_type") == "ADALORA" and bool(config.get("rank_pattern"))
    for key, tensor in tensors.items():
        _check_key(key, where)
        if tensor.is_meta and values:
            raise FormatError(f"{where}: {key!r} has no values: it is on the meta device")
        if not tensor.numel() and not may_be_empty:
            raise FormatError(
                f"{where}: {key!r} is empty, of shape {tuple(tensor.shape)}: was it saved from a sharded model?"
            )
        if values and (tensor.is_floating_point() or tensor.is_complex()) and not is_finite(tensor):
            raise FormatError(f"{where}: {key!r} holds NaN or infinity")
