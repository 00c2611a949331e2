"""Writing an adapter's files: after an error, earlier files are unchanged; invalid adapters are not written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.directory import files
from lightning_peft.formats.directory.files import read_config, read_files, write_files

from .conftest import CONFIG, tensors


def test_replacing_keeps_other_files_and_the_card(good):
    (good / "notes.txt").write_text("mine")
    write_files(good, {**CONFIG, "r": 5}, {"a": torch.ones(1)}, {}, None)
    read = read_files(good)
    assert (read.config["r"], list(read.tensors)) == (5, ["a"])
    assert (good / "notes.txt").read_text() == "mine"
    assert (good / files.CARD).read_text() == "# Card"
    assert len(list(good.iterdir())) == 4


@pytest.mark.parametrize("at", range(8))
def test_an_error_leaves_the_old_adapter_intact(good, monkeypatch, at):
    before = {p.name: p.read_bytes() for p in good.iterdir()}
    steps = iter(range(100))
    move = os.replace

    def failing(*args):
        if next(steps) == at:
            raise OSError("no space left on device")
        move(*args)

    monkeypatch.setattr(os, "replace", failing)
    if at < 6:
        with pytest.raises(OSError, match="no space left"):
            write_files(good, {**CONFIG, "r": 5}, {"a": torch.ones(1)}, {}, "# New")
        assert {p.name: p.read_bytes() for p in good.iterdir()} == before
    else:  # replacing takes six moves
        write_files(good, {**CONFIG, "r": 5}, {"a": torch.ones(1)}, {}, "# New")
        assert read_config(good)["r"] == 5


@pytest.mark.parametrize("at", range(1, 6))
def test_a_crash_while_replacing_leaves_no_mix_of_two_adapters(good, monkeypatch, at):
    """From the first move to the last, the directory must not read as an adapter."""
    steps = iter(range(100))
    move = os.replace

    def looking(*args):
        if next(steps) == at:
            with pytest.raises(FormatError, match=f"has no {files.CONFIG}"):
                read_files(good)
        move(*args)

    monkeypatch.setattr(os, "replace", looking)
    write_files(good, {**CONFIG, "r": 5}, {"a": torch.ones(1)}, {}, "# New")
    assert next(steps) == 6


def test_an_error_removes_a_new_card(good, monkeypatch):
    (good / files.CARD).unlink()
    move = os.replace

    def failing(source, target):
        if target == good / files.WEIGHTS and source.parent.name != "old":
            raise OSError("no space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        write_files(good, CONFIG, tensors(), {}, "# New")
    assert sorted(p.name for p in good.iterdir()) == sorted([files.CONFIG, files.WEIGHTS])


def test_an_error_leaves_no_new_directory(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        write_files(tmp_path / "a" / "b", CONFIG, tensors(), {}, None)
    assert not list((tmp_path / "a").iterdir())


def test_invalid_adapters_are_not_written(tmp_path):
    with pytest.raises(FormatError, match="JSON cannot represent"):
        write_files(tmp_path / "x", {**CONFIG, "r": {1, 2}}, tensors(), {}, None)
    with pytest.raises(FormatError, match="JSON cannot represent"):
        write_files(tmp_path / "x", {**CONFIG, "r": float("nan")}, tensors(), {}, None)
    with pytest.raises(FormatError, match=r"peft_type must be a string .*got None"):
        write_files(tmp_path / "x", {"r": 1}, tensors(), {}, None)
    with pytest.raises(FormatError, match="on the meta device"):
        write_files(tmp_path / "x", CONFIG, {"a": torch.empty(2, device="meta")}, {}, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="is a file, but an adapter is saved as a directory"):
        write_files(tmp_path / "file", CONFIG, tensors(), {}, None)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writing_into_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(".", CONFIG, tensors(), {}, None)
    write_files(".", {**CONFIG, "r": 9}, tensors(), {}, None)
    assert read_config(".")["r"] == 9
    assert sorted(p.name for p in Path().iterdir()) == sorted([files.CONFIG, files.WEIGHTS])
