"""Read and write the files of an adapter directory safely.

A directory holds ``adapter_config.json`` (the configuration), ``adapter_model.safetensors`` (the tensors, with metadata
in the header) and often a ``README.md``. All of it is treated as data: names in a file are never imported, nothing in
it runs, and sizes that it declares are checked against its real size before memory is allocated.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_peft.core.names import nearest
from lightning_peft.core.state.atomic_file import to_disk, writing
from lightning_peft.core.untrusted import FormatError, parse_json
from lightning_peft.formats.directory.replace import CARD, CONFIG, WEIGHTS, complete_replacement, replace_files
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

MAX_JSON = 16 * 2**20  #: maximum size of a configuration, or of the header of a tensor file, in bytes
MAX_KEY = 1024  #: maximum length of a tensor's name, in characters
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass
class AdapterFiles:
    """The content of an adapter directory.

    Attributes:
        directory: The directory.
        config: The content of ``adapter_config.json``.
        tensors: Name in the file -> tensor, on the CPU.
        metadata: The metadata in the header of the tensor file.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass
class TensorInfo:
    """The header entry of one tensor: its safetensors dtype, such as ``F32``, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def adapter_folders(directory: str | Path) -> list[Path]:
    """Return the adapter directories at ``directory``: itself and its subdirectories, if they hold an adapter.

    Raises:
        FormatError: if there is none, or if a subdirectory links out of ``directory``.
    """
    directory = _folder(directory)
    inside = []
    for folder in sorted(p for p in directory.iterdir() if not p.name.startswith(".")):
        complete_replacement(folder)
        inside += [folder] if (folder / CONFIG).is_file() else []
    for folder in inside:
        _stays_inside(folder, directory)
    found = [directory] * (directory / CONFIG).is_file() + inside
    if not found:
        raise FormatError(f"{directory} has no {CONFIG}, and no folder in it has one: {_contents(directory)}")
    return found


def read_files(directory: str | Path) -> AdapterFiles:
    """Read the adapter in ``directory``.

    Args:
        directory: An adapter directory of this package or of Hugging Face PEFT. It may be in the Hugging Face cache,
            whose files are symbolic links.

    Raises:
        FormatError: if a file is missing, damaged, not JSON or safetensors, or too large; if a name, a value or a
            declared size is invalid; or if a tensor has changed since it was saved.
    """
    directory = _folder(directory)
    config = read_config(directory)
    header, metadata = read_header(directory)
    path = directory / WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
    if tensors.keys() != header.keys():  # the checked header must be the one that the tensors were read with
        raise FormatError(f"{path} changed while it was read: wait until it is written, then load it again")
    _check_tensors(tensors, str(path))
    check_tensors(tensors, metadata, str(directory))
    return AdapterFiles(directory, config, tensors, metadata)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` alone.

    Raises:
        FormatError: if the file is missing, not a JSON object, too large or nested too deeply, or has no
            ``peft_type``.
    """
    path = _file(_folder(directory), CONFIG)
    if path.stat().st_size > MAX_JSON:
        raise FormatError(f"{path} has {path.stat().st_size:,} bytes, but at most {MAX_JSON:,} are read")
    config = parse_json(path.read_bytes(), str(path))
    if not isinstance(config.get("peft_type"), str):
        raise FormatError(f"{path}: peft_type must be a string that names the method, got {config.get('peft_type')!r}")
    return config


def read_header(directory: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of ``adapter_model.safetensors``: dtype and shape of each tensor, and the metadata.

    Raises:
        FormatError: if the file is missing or not a safetensors file, or if a name or size in it is invalid.
    """
    path = _file(_folder(directory), WEIGHTS)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FormatError(
                f"{path} is not a safetensors file, or is cut off: it has {size:,} bytes. Use another copy of it"
            )
        if length > MAX_JSON:
            raise FormatError(f"{path} has a header of {length:,} bytes, but at most {MAX_JSON:,} are read")
        header = parse_json(file.read(length), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must hold strings")
    # The ranges must cover the data without gaps or overlaps. Otherwise a small file could declare large tensors, or
    # hide data that no tensor shows.
    tensors, at = {}, 0
    ranges = []
    for key, entry in header.items():
        tensors[key], begin, end = _entry(key, entry, path)
        ranges.append((begin, end, key))
    for begin, end, key in sorted(ranges):
        if begin != at:
            raise FormatError(f"{path}: {key!r} begins at byte {begin:,}, but the previous tensor ends at {at:,}")
        at = end
    if at != size - 8 - length:
        raise FormatError(f"{path} declares {at:,} bytes of tensors but holds {size - 8 - length:,}: it is damaged")
    return tensors, metadata


def write_files(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    card: str | None,
) -> None:
    """Write an adapter into ``directory``: either all files or, on any error, none.

    The files are first written to a temporary directory and then moved. A reader during the moves finds no
    configuration rather than a mix of two adapters; after a crash between them, it completes them. Other files in
    ``directory`` are kept.

    Args:
        directory: Created with its parents if it does not exist.
        config: The configuration in plain values, with ``peft_type``.
        tensors: Name in the file -> tensor.
        metadata: The metadata for the header of the tensor file.
        card: The text of ``README.md``; with None an existing one is kept.

    Raises:
        FormatError: if ``directory`` is a file, or if the adapter could not be read again: it has no tensors, an empty
            or non-finite tensor, an invalid name, or a configuration that JSON cannot represent.
        OSError: if the files cannot be written; the message names ``directory``.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise FormatError(f"{directory} is a file, but an adapter is saved as a directory: choose another path")
    text = check_content(config, tensors)
    # If the directory exists, the temporary one is made inside it: it may be a mount point, and a move between two
    # file systems is not atomic.
    beside = (directory if directory.exists() else directory.parent) / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    with writing(directory):
        complete_replacement(directory)
        beside.mkdir(parents=True)
        try:
            own = _unshared(tensors)
            save_file(own, beside / WEIGHTS, seal(json.loads(text), own, {"format": "pt", **metadata}))
            (beside / CONFIG).write_text(text + "\n", encoding="utf-8")
            if card is not None:
                (beside / CARD).write_text(card, encoding="utf-8")
            read_config(beside), read_header(beside)  # the written files must pass the checks that reading makes
            for file in beside.iterdir():
                to_disk(file)
            if beside.parent == directory:
                replace_files(directory, beside)
            else:
                beside.rename(directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def check_content(config: Mapping[str, Any], tensors: Mapping[str, Tensor], values: bool = True) -> str:
    """Check that an adapter can be written and read again, and return the text of ``adapter_config.json``.

    Args:
        config: As in :func:`write_files`.
        tensors: As in :func:`write_files`.
        values: Whether to check the tensors' values too.

    Raises:
        FormatError: as :func:`write_files`.
    """
    text = json_text(config, indent=2, sort_keys=True)
    _check_tensors(tensors, "the adapter", values)
    return text


def json_text(value: Any, **options: Any) -> str:
    """Return ``value`` as JSON.

    Raises:
        FormatError: if JSON cannot represent it.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"JSON cannot represent the configuration of this adapter: {error}. Use plain values as arguments"
        ) from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors to the CPU so that no two share memory, which safetensors refuses to write."""
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
        hub = f"to load it from the Hub, download it first: huggingface_hub.snapshot_download({str(directory)!r})"
        hint = f"; near it: {', '.join(near)}" if near else f"; {hub}" if str(directory).count("/") == 1 else ""
        raise FormatError(f"there is no directory {path}{hint}")
    if not path.is_dir():
        hint = f"; convert a checkpoint with `lightning-peft export {path} out/`" if path.suffix == ".ckpt" else ""
        raise FormatError(f"{path} is a file, but an adapter is a directory with {CONFIG} and {WEIGHTS}{hint}")
    path = path.resolve()
    complete_replacement(path)
    return path


def _file(directory: Path, name: str) -> Path:
    """The path of ``name``, checked to be a regular file inside ``directory``."""
    path = directory / name
    if path.is_symlink() or path.exists():
        _stays_inside(path, directory)
        if not path.is_file():
            raise FormatError(f"{path} is not a regular file")
        return path
    if name == WEIGHTS:
        if (directory / f"{WEIGHTS}.index.json").exists():
            raise FormatError(
                f"{directory} holds tensors in several files, as whole models are stored, but an adapter has one file: "
                "load a whole model with from_pretrained"
            )
        pickles = [p.name for p in sorted(directory.iterdir()) if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        if pickles:
            raise FormatError(
                f"{directory} holds {pickles[0]} but no {WEIGHTS}. The file is a pickle and is not read, because "
                "reading a pickle can run any program. If you trust it, load and save it with PEFT: "
                "PeftModel.from_pretrained(base, directory).save_pretrained(directory, safe_serialization=True)"
            )
    inside = sorted(p.parent.name for p in directory.glob(f"*/{name}"))
    hint = f", but its folders {', '.join(inside[:5])} do" if inside else f": {_contents(directory)}"
    raise FormatError(f"{directory} has no {name}{hint}")


def _contents(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    if "config.json" in names:
        return "it holds a whole model ('config.json'), which from_pretrained loads"
    return f"it holds {', '.join(map(repr, names[:6]))}" if names else "it is empty"


def _stays_inside(path: Path, directory: Path) -> None:
    """Refuse a symbolic link that leads out of the directory, except those of the Hugging Face cache.

    In the cache, ``<model>/snapshots/<revision>/<file>`` links to ``<model>/blobs/<digest>``. Any other link could make
    a downloaded directory read a private file of the user.
    """
    target = path.resolve()
    snapshots = next((p for p in (directory, *directory.parents) if p.parent.name == "snapshots"), None)
    blobs = None if snapshots is None else snapshots.parent.parent / "blobs"
    if not target.is_relative_to(directory) and target.parent != blobs:
        raise FormatError(f"{path} is a symbolic link to {target}, which is outside the adapter's directory")


def _entry(key: str, entry: Any, path: Path) -> tuple[TensorInfo, int, int]:
    """Check one entry of a header; return it with the first and last byte offset of its data."""
    _check_key(key, str(path))

    def sizes(value: Any) -> bool:  # type(), not isinstance: JSON's true is an int in Python
        return isinstance(value, list) and len(value) <= 16 and all(type(v) is int and 0 <= v < 2**63 for v in value)

    known = isinstance(entry, dict) and sizes(entry.get("shape")) and sizes(entry.get("data_offsets"))
    if not known or len(entry["data_offsets"]) != 2:
        raise FormatError(f"{path}: {key!r} must have a shape and two data_offsets, got {str(entry)[:120]}")
    if entry.get("dtype") not in _BYTES:
        raise FormatError(f"{path}: {key!r} has dtype {entry.get('dtype')!r}; supported are {', '.join(_BYTES)}")
    info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
    begin, end = entry["data_offsets"]
    if end - begin != info.numel * _BYTES[info.dtype]:
        raise FormatError(
            f"{path}: {key!r} is declared as {info.dtype} of shape {info.shape}, which takes "
            f"{info.numel * _BYTES[info.dtype]:,} bytes, but has {end - begin:,}: the file is damaged"
        )
    return info, begin, end


def _check_key(key: str, where: str) -> None:
    if not key.isprintable() or "\\" in key or len(key) > MAX_KEY or not all(key.split(".")):
        shown = ascii(key[:80])
        raise FormatError(f"{where}: {shown} is not a valid tensor name: use names joined by '.', as in state dicts")


def _check_tensors(tensors: Mapping[str, Tensor], where: str, values: bool = True) -> None:
    """Refuse invalid names, and tensors that are not finite."""
    if not tensors:
        raise FormatError(f"{where} holds no tensors")
    for key, tensor in tensors.items():
        _check_key(key, where)
        if tensor.layout is not torch.strided:
            raise FormatError(f"{where}: {key!r} is stored as {tensor.layout}, which the file format cannot hold")
        if tensor.is_meta and values:
            raise FormatError(f"{where}: {key!r} is on the meta device and has no values: materialize the model first")
        if values and (tensor.is_floating_point() or tensor.is_complex()) and not is_finite(tensor):
            raise FormatError(f"{where}: {key!r} holds NaN or infinity: save the adapter from an earlier checkpoint")
