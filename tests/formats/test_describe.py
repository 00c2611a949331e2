"""Descriptions of adapter files, made without a model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_peft as lp
from lightning_peft.core.untrusted import FormatError
from lightning_peft.formats.describe import READABLE, describe
from lightning_peft.formats.directory.files import CONFIG, WEIGHTS, read_files, write_files
from lightning_peft.formats.registry import CONVERTERS
from lightning_peft.formats.save import save_adapter
from tests.formats.models import adapted, llama, made_by_peft
from tests.trainer.toys import Toy, loader, lora, trainer, val_loader


def test_describing_a_native_adapter(tmp_path):
    model = adapted(llama(), lp.LoRA(r=3, targets=["q_proj"], name="mine"))
    save_adapter(model, tmp_path / "a")
    found = describe(tmp_path / "a")
    (adapter,) = found.adapters
    assert (found.kind, adapter.name, adapter.method, adapter.made_by) == ("adapter", "mine", "LoRA", "lightning_peft")
    assert adapter.parameters == 2 * 3 * (32 + 32) == sum(p.numel() for p in lp.trainable_parameters(model))
    assert found.size == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    assert adapter.config["r"] == 3
    for shown in ("mine", "LoRA", "384 in 4 tensors", "q_proj"):
        assert shown in str(found)


def test_adapters_of_peft_in_several_folders(tmp_path):
    base = llama()
    made_by_peft(base, peft.LoraConfig(r=2, target_modules=["v_proj"]), tmp_path)
    made_by_peft(base, peft.BOFTConfig(boft_block_size=4, target_modules=["v_proj"]), tmp_path / "second")
    found = describe(tmp_path)
    first, second = found.adapters
    assert (found.kind, first.method, first.made_by, first.note) == ("2 adapters", "LORA", "peft", "")
    assert first.parameters == 2 * 2 * (32 + 16)
    assert second.method == "BOFT"
    assert "supported are" in second.note
    assert "Hugging Face PEFT" in str(found)
    assert "cannot be loaded" in str(found)


def test_an_unknown_type_lists_the_supported_ones(tmp_path, monkeypatch):
    (tmp_path / "hostile_method.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for peft_type, hint in (("LORRA", "is not supported; supported are"), ("hostile_method.Evil", "is not supported")):
        write_files(tmp_path / "a", {"peft_type": peft_type}, {"a": torch.ones(1)}, {}, None)
        assert hint in describe(tmp_path / "a").adapters[0].note
        with pytest.raises(FormatError, match=hint):
            lp_load(tmp_path / "a")
    assert not Path("ran").exists()


def lp_load(directory: Path) -> None:
    from lightning_peft.formats.load import load_adapter

    load_adapter(nn.Sequential(nn.Linear(2, 2)), directory)


def test_a_checkpoint(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="run", monitor="val_loss")
    run = trainer(tmp_path, save, method=lora(r=4, name="mine"), max_epochs=2)
    module = Toy()
    run.fit(module, loader(), val_loader())
    found = describe(tmp_path / "run.ckpt")
    (adapter,) = found.adapters
    assert (found.kind, adapter.name, adapter.method, adapter.config["r"]) == ("checkpoint", "mine", "LoRA", 4)
    expected = lp.adapter_state(module, "mine")
    assert adapter.tensors.keys() == expected.keys()
    assert adapter.parameters == sum(v.numel() for v in expected.values())
    assert found.facts["val_loss"] == f"{save.current_score.item():.6g}"
    assert found.facts["of the base's own"].startswith("34 values")
    trains = sum(p.numel() for p in lp.trainable_parameters(module))
    assert found.facts["trains"].startswith(f"{trains} of ")
    assert found.size == (tmp_path / "run.ckpt").stat().st_size


def test_a_checkpoint_of_several_processes(tmp_path):
    import torch.distributed.checkpoint as dcp

    save = ModelCheckpoint(tmp_path, filename="run")
    trainer(tmp_path, save, method=lora(r=4), max_epochs=1).fit(Toy(), loader())
    whole = torch.load(tmp_path / "run.ckpt", weights_only=True)
    state = whole.pop("state_dict")
    dcp.save({"state_dict": state}, checkpoint_id=tmp_path / "folder")
    torch.save(whole, tmp_path / "folder" / "meta.pt")
    one, several = describe(tmp_path / "run.ckpt"), describe(tmp_path / "folder")
    assert several.adapters == one.adapters
    assert several.facts == one.facts


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_files_that_would_run_code_or_are_not_checkpoints_are_refused():
    torch.save({"lightning_peft": Payload()}, "bad.ckpt")
    with pytest.raises(lp.StateError, match=r"would run .*mkdir"):
        describe("bad.ckpt")
    assert not Path("ran").exists()
    for content in ({"state_dict": {}}, [1]):
        torch.save(content, "plain.ckpt")
        with pytest.raises(lp.StateError, match="has no 'lightning_peft' manifest"):
            describe("plain.ckpt")
    for manifest in ({}, {"methods": 3}, {"methods": [{}]}, {"methods": [], "trainable": "x", "total": []}):
        torch.save({"lightning_peft": manifest}, "odd.ckpt")
        with pytest.raises(lp.StateError, match="cannot read the run information in"):
            describe("odd.ckpt")
    with pytest.raises(FormatError, match="no file or directory nowhere"):
        describe("nowhere")


def test_text_of_a_file_is_not_rendered_as_markup(tmp_path):
    text = "[red]x[/red]\x1b[2J\nsecond line"
    write_files(tmp_path, {"peft_type": "LORA", "base_model_name_or_path": text}, {"a": torch.ones(1)}, {}, None)
    assert r"[red]x[/red]\x1b[2J\nsecond line" in str(describe(tmp_path))


def test_invalid_metadata(tmp_path):
    save_adapter(adapted(llama(), lp.LoRA(r=3, targets=["q_proj"])), tmp_path)
    files = read_files(tmp_path)
    odd = ({"config": 1}, {"fingerprint": []}, {"fingerprint": {"values": {"a": "b"}}}, {"metrics": [1]})
    for text in ("{", "[]", '{"a": NaN}', "[" * 100_000, *map(json.dumps, odd)):
        write_files(tmp_path, files.config, files.tensors, {"lightning_peft": text}, None)
        for read in (describe, lp_load):
            with pytest.raises(FormatError, match=r"the metadata 'lightning_peft' of .*(is|holds|nested)"):
                read(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FormatError, match=f"has no {WEIGHTS}"):
        describe(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FormatError, match=f"has no {CONFIG}"):
        describe(tmp_path)


def test_the_types_that_are_read_without_the_converters_are_theirs():
    assert {converter.peft_type for converter in CONVERTERS} == READABLE
