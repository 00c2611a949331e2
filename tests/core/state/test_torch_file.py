"""Test that reading a torch file returns tensors and plain values and never runs code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.core.state.torch_file import read_torch_file


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_and_plain_values_come_back(mmap):
    torch.save({"a": torch.arange(3), "b": [1, "x", None]}, "file.ckpt")
    read = read_torch_file("file.ckpt", mmap=mmap)
    assert torch.equal(read.pop("a"), torch.arange(3))
    assert read == {"b": [1, "x", None]}


def test_a_payload_is_named_and_not_run():
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Payload()}, "file.ckpt")
    with pytest.raises(lp.StateError, match=r"file.ckpt was not read, because reading it would run (posix|nt).mkdir"):
        read_torch_file("file.ckpt")
    assert not Path("ran").exists()


@pytest.mark.parametrize("data", [pickle.dumps(Payload()), b"hello", b"", b"PK\x03\x04" + bytes(100)])
def test_files_that_torch_did_not_write(data):
    Path("file.ckpt").write_bytes(data)
    with pytest.raises(lp.StateError, match=r"file\.ckpt is not a torch file|file\.ckpt was not read"):
        read_torch_file("file.ckpt")
    assert not Path("ran").exists()


def test_a_truncated_file_and_a_missing_one():
    torch.save({"a": torch.zeros(10_000)}, "file.ckpt")
    Path("file.ckpt").write_bytes(Path("file.ckpt").read_bytes()[:20_000])
    with pytest.raises(lp.StateError, match="is not a torch file"):
        read_torch_file("file.ckpt")
    with pytest.raises(lp.StateError, match=r"there is no file nowhere\.ckpt"):
        read_torch_file("nowhere.ckpt")
