"""Adapters are loaded on demand, dropped when memory is full, and replaced when their files change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import adapter_names
from lightning_peft.serving.errors import RequestError
from lightning_peft.serving.pool import AdapterFolder, AdapterPool
from tests.serving.modules import Regressor, save_adapters

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapters(tmp_path / "in", {name: lp.LoRA(r=2, targets="all-linear", exclude=()) for name in "abc"})
    return tmp_path / "in"


def pool_of(folder: Path, max_bytes: int | None = None) -> AdapterPool:
    return AdapterPool(Regressor(), AdapterFolder(folder), max_bytes)


def refused(call, status: int) -> str:
    with pytest.raises(RequestError) as error:
        call()
    assert error.value.status == status
    return error.value.message


def test_an_adapter_is_loaded_once(folder: Path):
    pool = pool_of(folder)
    first, second = pool.acquire("a"), pool.acquire("a")
    assert first is second
    assert list(adapter_names(pool.model)) == [first.internal]


def test_the_least_recently_used_adapter_is_dropped_when_memory_is_full(folder: Path):
    pool = pool_of(folder, max_bytes=2 * pool_of(folder).acquire("a").nbytes)
    for name in "ab":
        pool.release(pool.acquire(name))
    pool.release(pool.acquire("a"))
    pool.release(pool.acquire("c"))
    assert "b" not in pool._current
    assert pool.nbytes <= pool.max_bytes


def test_adapters_in_use_are_kept_and_the_request_is_told_to_come_again(folder: Path):
    pool = pool_of(folder, max_bytes=pool_of(folder).acquire("a").nbytes)
    used = pool.acquire("a")
    assert "in use" in refused(lambda: pool.acquire("b"), 503)
    pool.release(used)
    assert pool.acquire("b").name == "b"


def test_changed_files_are_loaded_again_while_requests_still_use_the_old_ones(folder: Path):
    pool = pool_of(folder)
    old = pool.acquire("a")
    shutil.copytree(folder / "b", folder / "a", dirs_exist_ok=True)
    new = pool.acquire("a")
    assert old.internal != new.internal
    assert set(adapter_names(pool.model)) == {old.internal, new.internal}
    pool.release(old)
    assert list(adapter_names(pool.model)) == [new.internal]
    want = Regressor()
    lp.load_adapter(want, folder / "b", "b")
    with lp.active(pool.model, new.internal):
        torch.testing.assert_close(pool.model.predict_step(X, 0), want.predict_step(X, 0))


def test_a_damaged_adapter_is_refused_until_its_files_change_and_the_others_go_on(folder: Path):
    file = folder / "a" / "adapter_model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-4])
    pool = pool_of(folder)
    for _ in range(2):
        message = refused(lambda: pool.acquire("a"), 500)
        assert str(folder) not in message
    assert pool.acquire("b").name == "b"
    file.write_bytes(good)
    assert pool.acquire("a").name == "a"


@pytest.mark.parametrize("name", ["../in/a", "/etc", "a/../b", "", ".", "..", "linked", "A", "a\x00", "a" * 10_000])
def test_no_name_reaches_outside_of_the_folder(folder: Path, name: str, caplog):
    save_adapters(folder.parent / "outside", {"x": lp.LoRA(r=2, targets="all-linear", exclude=())})
    (folder / "linked").symlink_to(folder.parent / "outside" / "x")
    assert AdapterFolder(folder).names() == ["a", "b", "c"]
    assert "links to adapters are not served: linked;" in caplog.text
    refused(lambda: pool_of(folder).acquire(name), 404)


def test_a_name_that_never_existed_does_not_delay_the_requests_of_others(folder: Path, monkeypatch):
    known = AdapterFolder(folder)
    known.find("a")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the model's process waits"))
    assert "nearest name is 'a'" in refused(lambda: known.find("aa"), 404)
    monkeypatch.undo()
    configuration, waits = folder / "a" / "adapter_config.json", []
    hidden = configuration.rename(configuration.with_suffix(".old"))
    monkeypatch.setattr("time.sleep", lambda seconds: (waits.append(seconds), hidden.rename(configuration)))
    assert known.find("a")[0] == folder / "a", "an adapter that is being replaced is waited for"
    assert len(waits) == 1


def test_adapters_that_come_and_go_later_are_noticed(folder: Path):
    pool = pool_of(folder)
    refused(lambda: pool.acquire("d"), 404)
    shutil.copytree(folder / "a", folder / "d")
    assert pool.acquire("d").name == "d"
    shutil.move(folder / "d", folder.parent / "d")
    (folder / "d").symlink_to(folder.parent / "d")
    refused(lambda: pool.acquire("d"), 404)


def test_files_that_link_out_of_the_folder_are_refused(folder: Path):
    save_adapters(folder.parent / "outside", {"x": lp.LoRA(r=2, targets="all-linear", exclude=())})
    file = folder / "a" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(folder.parent / "outside" / "x" / file.name)
    refused(lambda: pool_of(folder).acquire("a"), 500)


def test_the_folder_must_contain_adapters_not_be_one(folder: Path):
    with pytest.raises(FileNotFoundError, match="is an adapter itself"):
        AdapterFolder(folder / "a")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        AdapterFolder(folder / "nothing")
