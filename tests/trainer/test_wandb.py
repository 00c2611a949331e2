"""W&B in offline mode: the content of a run, and resumed fits that continue their run."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.trainer.logs.run_ids import resume_runs

from .toys import Toy, every_step, loader, trainer, val_loader

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    yield
    wandb.finish()


def records(root: Path) -> list[tuple[str, Any]]:
    """All records written offline below ``root``, as (run id, record)."""
    from wandb.proto import wandb_internal_pb2 as pb

    # If it had a run of that id before, wandb's service may still write for a moment after finish().
    end = time.monotonic() + 20
    while not all(_complete(file) for file in root.rglob("run-*.wandb")) and time.monotonic() < end:
        time.sleep(0.1)
    found = []
    for file in sorted(root.rglob("run-*.wandb")):
        for data in _scan(file):
            record = pb.Record()
            record.ParseFromString(data)
            found.append((file.stem.removeprefix("run-"), record))
    return found


def _complete(path: Path) -> bool:
    from wandb.proto import wandb_internal_pb2 as pb

    chunks = _scan(path)
    return bool(chunks) and pb.Record.FromString(chunks[-1]).WhichOneof("record_type") in ("exit", "footer", "final")


def _scan(path: Path) -> list[bytes]:
    """Parse the records of wandb's log: a header, then 32 kB blocks of chunks (checksum, length, type)."""
    raw, at, out, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        part += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            out.append(part)
            part = b""
    return out


def config_of(found: list[tuple[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for _, record in found:
        for update in (*record.config.update, *record.run.config.update):
            config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
    return config


def logged(found: list[tuple[str, Any]]) -> set[str]:
    """The names of all logged values."""
    return {item.key or item.nested_key[0] for _, r in found if r.HasField("history") for item in r.history.item}


def artifact_of(record: Any) -> Any:
    if record.HasField("artifact"):
        return record.artifact
    return record.request.log_artifact.artifact if record.request.HasField("log_artifact") else None


class Killed(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("killed")


def logger(root: Path) -> WandbLogger:
    return WandbLogger(save_dir=str(root), project="test")


@pytest.mark.parametrize("how", ["by itself", "with resume_runs"])
def test_a_killed_run_continues_under_its_id(tmp_path: Path, how: str) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    log = logger(tmp_path / "first")
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, *every_step(tmp_path), Killed(), logger=log, log_every_n_steps=1).fit(Toy(), loader())
    run_id = log.version
    wandb.finish()

    again = logger(tmp_path / "second")
    if how == "with resume_runs":
        resume_runs([again], tmp_path / "step=3.ckpt")
        assert again.version == run_id
    run = trainer(tmp_path, logger=again, log_every_n_steps=1, enable_checkpointing=False)
    run.fit(Toy(), loader(), val_loader(), ckpt_path=tmp_path / "step=3.ckpt")
    assert again.version == run_id
    wandb.finish()

    for part in ("first", "second"):
        found = records(tmp_path / part)
        assert {i for i, _ in found} == {run_id}, "an orphan was left"
        assert len(list((tmp_path / part / "wandb").glob("offline-run-*"))) == 1
        peft = config_of(found)["peft"]
        assert peft["methods"]["default"]["method"] == "LoRA"
        assert peft["methods"]["default"]["r"] == 4
        assert (peft["trainable"], peft["total"]) == (290, 866)
        assert peft["percent"] == pytest.approx(100 * 290 / 866)
        assert config_of(found)["width"] == 16
        assert {"loss", "default/grad_norm", "default/relative_update", "throughput/step_time"} <= logged(found)
    artifacts = [a for _, r in records(tmp_path / "second") if (a := artifact_of(r)) is not None]
    assert [(a.name, a.type) for a in artifacts] == [(f"adapter-{run_id}", "adapter")]
    _check_loads(artifacts[0], run.lightning_module, tmp_path / "downloaded")


def _check_loads(artifact: Any, trained: Toy, folder: Path) -> None:
    """The files of the artifact are an adapter directory, with the adapter as it was at the end of the run."""
    assert json.loads(artifact.metadata)["base"] == "Toy"
    folder.mkdir()
    for entry in artifact.manifest.contents:
        shutil.copy(entry.local_path, folder / entry.path)
    fresh = Toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "Api", lambda: SimpleNamespace(artifact=lambda name: _Downloaded(name, folder)))
        assert lp.load_adapter(fresh, "wandb:me/test/adapter-1:v0") == ["default"]
    x = torch.randn(4, 16)
    torch.testing.assert_close(fresh.eval()(x), trained.eval()(x))


class _Downloaded:
    def __init__(self, name: str, folder: Path) -> None:
        assert name == "me/test/adapter-1:v0"
        self.folder = folder

    def download(self) -> str:
        return str(self.folder)


def test_an_artifact_that_cannot_be_downloaded_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_api() -> Any:
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "Api", no_api)
    with pytest.raises(lp.FormatError, match=r"'me/test/a:v0' cannot be downloaded from W&B: no network"):
        lp.load_adapter(Toy(), "wandb:me/test/a:v0")


def test_an_id_that_the_user_set_is_kept(tmp_path: Path) -> None:
    trainer(tmp_path, *every_step(tmp_path), logger=logger(tmp_path), max_epochs=1).fit(Toy(), loader())
    wandb.finish()
    mine = WandbLogger(save_dir=str(tmp_path), project="test", id="mine")
    resume_runs([mine], tmp_path / "step=3.ckpt")
    trainer(tmp_path, logger=mine, enable_checkpointing=False).fit(Toy(), loader(), ckpt_path=tmp_path / "step=3.ckpt")
    assert mine.version == "mine"


def test_paths_without_a_run_have_no_effect(tmp_path: Path) -> None:
    log = logger(tmp_path)
    for path in (None, "last", tmp_path / "no.ckpt"):
        resume_runs([log], path)
    trainer(tmp_path, *every_step(tmp_path), max_epochs=1).fit(Toy(), loader())
    resume_runs([log], tmp_path / "step=3.ckpt")
    assert log.version is None
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.fixture
def _own_setup() -> Any:
    """wandb reads the parameters of a sweep once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("_own_setup")
def test_a_point_of_the_sweep_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line is made by wandb's own functions, and the environment is that of its agent."""
    from wandb.sdk.launch.sweeps import utils

    root = Path(__file__).parents[2]
    blocks = re.findall(r"```yaml\n(.*?)```", (root / "docs/logging.md").read_text(), re.DOTALL)
    (sweep,) = (found for block in blocks if "command" in (found := yaml.safe_load(block)))
    point = {
        name: {"value": max(s["values"]) if "values" in s else s["max"]} for name, s in sweep["parameters"].items()
    }
    assert point["method.r"] == {"value": 16}
    words = utils.create_sweep_command(sweep["command"])
    at = words.index("${args}")
    words[at : at + 1] = utils.create_sweep_command_args({"args": point})["args"]

    monkeypatch.chdir(tmp_path)
    shutil.copytree(
        root / "recipes", "recipes", ignore=lambda folder, names: [n for n in names if n != "quickstart.yaml"]
    )
    Path("sweep-parameters.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **point}))
    for name, value in {"ID": "s1", "PARAM_PATH": "sweep-parameters.yaml"}.items():
        monkeypatch.setenv(f"WANDB_SWEEP_{name}", value)
    monkeypatch.setenv("WANDB_RUN_ID", "point1")
    short = [f"--trainer.limit_{stage}_batches=1" for stage in ("train", "val")]
    main(
        [*words[words.index("lightning-peft") + 1 :], *short, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1"]
    )
    wandb.finish()

    found = records(tmp_path)
    assert {run_id for run_id, _ in found} == {"point1"}
    config = config_of(found)
    assert (
        config["method.r"]
        == config["cli"]["method"]["init_args"]["r"]
        == config["peft"]["methods"]["default"]["r"]
        == 16
    )
    assert config["cli"]["model"]["init_args"]["lr"] == 0.01
    assert config["peft"]["methods"]["default"]["lora_plus_ratio"] == 16
    assert sweep["metric"]["name"] in logged(found)


def test_the_resumed_run_keeps_an_id_that_is_valid_only(tmp_path: Path) -> None:
    trainer(tmp_path, *every_step(tmp_path), logger=logger(tmp_path), max_steps=1).fit(Toy(), loader())
    wandb.finish()
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    checkpoint["lightning_peft"]["wandb"] = ["../../elsewhere"]
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    with pytest.raises(lp.StateError, match="as the id of a W&B run, which is not a valid id: it was edited"):
        resume_runs([logger(tmp_path)], tmp_path / "edited.ckpt")
