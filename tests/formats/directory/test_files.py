"""Reading an adapter's files: valid ones come back bit for bit, hostile ones are refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory import files
from lightning_peft.formats.directory.files import adapter_folders, read_config, read_files, read_header, write_files

from .conftest import CONFIG, KEY, tensors


def header_only(directory: Path, header: object, data: bytes = b"") -> None:
    """Write a safetensors file with this header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / files.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape=(2, 3), begin=0, end=24, dtype="F32", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


class Payload:
    """Runs a program when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


# ---- valid files


def test_files_come_back_bit_for_bit(good):
    read = read_files(good)
    assert read.config == CONFIG
    assert {**read.metadata, "lightning_peft": '{"a": 1}', "format": "pt"} == read.metadata
    assert read.tensors.keys() == tensors().keys()
    for key, value in tensors().items():
        assert read.tensors[key].dtype == value.dtype
        assert torch.equal(read.tensors[key], value)
    header, _ = read_header(good)
    assert (header[KEY].dtype, header[KEY].shape, header[KEY].numel) == ("F32", (2, 3), 6)
    assert sorted(p.name for p in good.iterdir()) == sorted([files.CONFIG, files.WEIGHTS, files.CARD])


def test_files_written_by_peft_are_read(tmp_path):
    import peft

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    read = read_files(tmp_path)
    assert read.config["peft_type"] == "LORA"
    expected = peft.get_peft_model_state_dict(model)
    assert read.tensors.keys() == expected.keys()
    assert all(torch.equal(v, read.tensors[k]) for k, v in expected.items())


def test_shared_views_and_transposed_tensors_are_written(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    given = {"a": whole, "b": whole, "row": whole[1], "turned": whole.t()}
    write_files(tmp_path / "x", CONFIG, given, {}, None)
    read = read_files(tmp_path / "x").tensors
    assert all(torch.equal(read[k], v) for k, v in given.items())


def test_an_adapter_that_lost_all_ranks_may_be_empty(tmp_path):
    config = {"peft_type": "ADALORA", "rank_pattern": {"layer.0.lora_E": [False, False]}}
    write_files(tmp_path / "x", config, {"layer.0.lora_A": torch.zeros(0, 4)}, {}, None)
    assert read_files(tmp_path / "x").tensors["layer.0.lora_A"].shape == (0, 4)


def test_the_hub_cache_is_read(good, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (files.CONFIG, files.WEIGHTS):
        (good / name).rename(cache / "blobs" / f"digest-{name}")
        (snapshot / name).symlink_to(f"../../blobs/digest-{name}")
    assert read_files(snapshot).config == CONFIG


def test_folders_of_several_adapters(good):
    assert adapter_folders(good) == [good]
    for name in ("b", "a"):
        write_files(good / name, CONFIG, tensors(), {}, None)
    (good / "no_adapter").mkdir()
    assert adapter_folders(good) == [good, good / "a", good / "b"]
    (good / files.CONFIG).unlink()
    assert adapter_folders(good) == [good / "a", good / "b"]
    with pytest.raises(FormatError, match="its folders a, b do"):
        read_files(good)


# ---- hostile or broken files


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2]", "is a JSON list; an object was expected"),
        ('"LORA"', "is a JSON str; an object"),
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('{"peft_type": "LORA", "r": 1, "r": 64}', "names 'r' twice"),
        ('{"peft_type": "LORA", "a": {"x": 1, "x": 2}}', "names 'x' twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "holds the number NaN"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "holds the number -Infinity"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "holds the number 1e999"),
        ('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"peft_type": "LORA", "a": ' + "[" * 40 + "]" * 40 + "}", "nested deeper than 32"),
        ('{"peft_type": "LORA", "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 32"),
        ("{}", "peft_type must be a string .* got None"),
        ('{"peft_type": ["LORA"]}', "peft_type must be a string"),
        ('{"peft_type": "LORA", "pad": "' + " " * files.MAX_JSON + '"}', "at most 16,777,216"),
    ],
    ids=lambda v: v[:24],
)
def test_invalid_configurations(good, text, reason):
    (good / files.CONFIG).write_text(text)
    with pytest.raises(FormatError, match=reason):
        read_files(good)


def test_a_configuration_that_is_not_text(good):
    (good / files.CONFIG).write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(FormatError, match="is not valid JSON"):
        read_config(good)


def test_modules_that_a_configuration_names_are_not_imported(good, monkeypatch):
    (good / "hostile_library.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(good)
    names = {"base_model_class": "Evil", "parent_library": "hostile_library"}
    config = {
        **CONFIG,
        "auto_mapping": names,
        "megatron_core": "hostile_library",
        "_class_path": "hostile_library.Evil",
    }
    (good / files.CONFIG).write_text(json.dumps(config))
    assert read_files(good).config == config
    assert "hostile_library" not in sys.modules
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "model.pkl"])
def test_a_pickle_in_the_place_of_tensors_is_not_run(good, name):
    (good / files.WEIGHTS).unlink()
    (good / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(
        FormatError,
        match=r"is a pickle and is not read, because reading a pickle can run any program.*safe_serialization=True",
    ):
        read_files(good)
    assert not Path("ran").exists()


def test_a_pickle_under_the_name_of_safetensors_is_not_run(good):
    for data in (pickle.dumps(Payload()), b"PK\x03\x04", b""):
        (good / files.WEIGHTS).write_bytes(data)
        with pytest.raises(FormatError, match="is not a safetensors file"):
            read_files(good)
    torch.save(Payload(), good / files.WEIGHTS)
    with pytest.raises(FormatError, match="is not a safetensors file"):
        read_files(good)
    assert not Path("ran").exists()


def test_shards_are_named(good):
    (good / files.WEIGHTS).unlink()
    (good / f"{files.WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')
    with pytest.raises(FormatError, match="tensors in several files"):
        read_files(good)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ([], "is a JSON list"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": {}, "a": {}}', "names 'a' twice"),
        ({"a": entry(dtype="F32", shape=(2, 3), end=23)}, "takes 24 bytes, but has 23"),
        ({"a": entry(shape=(2**40, 2**20))}, "takes 4,611,686,018,427,387,904 bytes, but has 24"),
        ({"a": entry(shape=(2**62, 2**62), end=2**62)}, "takes .* bytes, but has"),
        ({"a": entry(shape=(2**38,), end=2**40)}, "declares 1,099,511,627,776 bytes of tensors but holds 24"),
        ({"a": entry(shape=[1] * 17)}, "must have a shape"),
        ({"a": entry(shape=(-2, -3))}, "must have a shape"),
        ({"a": entry(shape=(True, 6))}, "must have a shape"),
        ({"a": entry(shape=(2.0, 3))}, "must have a shape"),
        ({"a": {**entry(), "data_offsets": [24]}}, "must have a shape and two data_offsets"),
        ({"a": {"shape": [6]}}, "must have a shape and two data_offsets"),
        ({"a": "F32"}, "must have a shape"),
        ({"a": entry(dtype="OBJECT")}, "has dtype 'OBJECT'"),
        ({"a": entry(begin=8, end=32)}, "'a' begins at byte 8, but the previous tensor ends at 0"),
        ({"a": entry(shape=(3,), end=12), "b": entry(shape=(3,), end=12)}, "but the previous tensor ends at 12"),
        ({"a": entry(shape=(3,), end=12)}, "declares 12 bytes of tensors but holds 24"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__ must hold strings"),
    ],
    ids=lambda v: str(v)[:32],
)  # fmt: skip
def test_invalid_headers(good, header, reason):
    header_only(good, header, b"\0" * 24)
    with pytest.raises(FormatError, match=reason):
        read_files(good)


def test_a_header_that_is_too_long(good):
    path = good / files.WEIGHTS
    data = path.read_bytes()
    for length in (2**63, len(data) - 7, len(data)):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(FormatError, match="is cut off"):
            read_files(good)
    path.write_bytes(data[:-1])
    with pytest.raises(FormatError, match="declares 30 bytes of tensors but holds 29"):
        read_files(good)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", files.MAX_JSON + 1))
        file.truncate(2**33)  # a sparse file, which takes no space on disk
    with pytest.raises(FormatError, match="header of 16,777,217 bytes"):
        read_files(good)


@pytest.mark.parametrize(
    "key", ["../../x", "..", "", "a..b", ".a", "a.", "a\nb", "a\x1b[31mb", "a\0b", "a\\b", "a\u202eb", "x" * 1025]
)
def test_invalid_tensor_names(good, tmp_path, key):
    header_only(good, {key: entry()}, b"\0" * 24)
    with pytest.raises(FormatError, match="is not a valid tensor name"):
        read_files(good)
    with pytest.raises(FormatError, match="is not a valid tensor name"):
        write_files(tmp_path / "new", CONFIG, {key: torch.ones(1)}, {}, None)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.tensor([1.0, float("nan")]), "'a' holds NaN or infinity"),
        (torch.tensor([1.0, float("inf")], dtype=torch.bfloat16), "'a' holds NaN or infinity"),
        (torch.tensor([float("nan")]).to(torch.float8_e4m3fn), "'a' holds NaN or infinity"),
        (None, "holds no tensors"),
    ],
)
def test_tensors_that_are_not_finite(good, tensor, reason):
    given = {} if tensor is None else {"a": tensor}
    save_file(given, good / files.WEIGHTS)
    with pytest.raises(FormatError, match=reason):
        read_files(good)
    before = (good / files.CONFIG).read_bytes()
    with pytest.raises(FormatError, match=reason):
        write_files(good, {**CONFIG, "r": 7}, given, {}, None)
    assert (good / files.CONFIG).read_bytes() == before


@pytest.mark.parametrize("name", [files.CONFIG, files.WEIGHTS])
def test_links_out_of_the_directory(good, tmp_path, name):
    (good / name).rename(tmp_path / "elsewhere")
    (good / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="is a symbolic link to"):
        read_files(good)
    (good / name).unlink()
    (tmp_path / "elsewhere").rename(good / "inside")
    (good / name).symlink_to("inside")
    assert read_files(good).config == CONFIG


def test_links_to_other_folders_called_blobs(good, tmp_path):
    (tmp_path / "blobs").mkdir()
    (good / files.CONFIG).rename(tmp_path / "blobs" / "secret")
    (good / files.CONFIG).symlink_to(tmp_path / "blobs" / "secret")
    with pytest.raises(FormatError, match="is a symbolic link to"):
        read_files(good)


def test_links_between_adapters_are_refused(good, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a").symlink_to(good)
    with pytest.raises(FormatError, match="is a symbolic link to"):
        adapter_folders(tmp_path / "many")


@pytest.mark.parametrize("name", [files.CONFIG, files.WEIGHTS])
def test_paths_that_are_not_regular_files(good, name):
    (good / name).unlink()
    os.mkfifo(good / name)  # reading it would block forever
    with pytest.raises(FormatError, match="is not a regular file"):
        read_files(good)
    (good / name).unlink()
    (good / name).mkdir()
    with pytest.raises(FormatError, match="is not a regular file"):
        read_files(good)


def test_missing_files(good, tmp_path):
    with pytest.raises(FormatError, match="there is no directory"):
        read_files(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="is a file, but an adapter is a directory"):
        read_files(good / files.WEIGHTS)
    (good / files.WEIGHTS).unlink()
    with pytest.raises(FormatError, match=r"has no adapter_model.safetensors: it holds 'README.md', 'adapter_config"):
        read_files(good)
    (tmp_path / "empty").mkdir()
    for read in (read_files, adapter_folders):
        with pytest.raises(FormatError, match="it is empty"):
            read(tmp_path / "empty")
