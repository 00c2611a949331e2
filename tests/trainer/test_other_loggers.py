"""TensorBoard, MLflow and CSV get the same values as W&B; skipped where the first two are not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

import lightning_peft as lp
from lightning_peft.trainer.logs.run_ids import resume_runs

from .toys import Toy, every_step, loader, trainer

METRICS = {"loss", "default/grad_norm", "default/step_norm", "throughput/step_time", "memory/peak_gb"}


def adalora() -> lp.AdaLoRA:
    return lp.AdaLoRA(target_r=2, init_r=4, trainable=["head"])


def test_tensorboard_gets_scalars_the_configuration_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLogger(tmp_path)
    trainer(tmp_path, method=adalora(), logger=log, log_every_n_steps=5, enable_checkpointing=False).fit(
        Toy(), loader()
    )
    events = EventAccumulator(log.log_dir).Reload()
    tags = events.Tags()
    assert {*METRICS, "default/rank_total", "default/rank/body.0"} <= {*tags["scalars"]}
    assert [event.step for event in events.Scalars("default/grad_norm")] == [4, 9]
    assert events.Scalars("default/rank_total")[-1].value == 4
    assert tags["images"] == ["default/ranks"]
    (text,) = events.Tensors("peft/text_summary")
    assert "| peft/methods/default/method | AdaLoRA |" in text.tensor_proto.string_val[0].decode()


def test_a_plot_for_csv_is_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = CSVLogger(tmp_path)
    trainer(tmp_path, method=adalora(), logger=log, enable_checkpointing=False).fit(Toy(), loader())
    assert (Path(log.log_dir) / "default/ranks.png").stat().st_size > 1000
    off = CSVLogger(tmp_path, version="off")
    monitor = lp.AdapterMonitor(plots=False)
    trainer(tmp_path, monitor, method=adalora(), logger=off, enable_checkpointing=False).fit(Toy(), loader())
    assert not list(Path(off.log_dir).rglob("*.png"))


def test_mlflow_gets_everything_and_a_resumed_fit_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)

    def logger(**given: Any) -> MLFlowLogger:
        return MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", **given)

    first = logger()
    fit = trainer(tmp_path, *every_step(tmp_path), method=adalora(), logger=first, log_every_n_steps=1, max_steps=3)
    fit.fit(Toy(), loader())
    client, run_id = first.experiment, first.run_id
    again = logger()
    resume_runs([again], tmp_path / "step=3.ckpt")
    run = trainer(tmp_path, method=adalora(), logger=again, log_every_n_steps=1, enable_checkpointing=False)
    run.fit(Toy(), loader(), ckpt_path=tmp_path / "step=3.ckpt")
    assert again.run_id == run_id
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics.keys() >= METRICS
    assert [m.step for m in client.get_metric_history(run_id, "default/grad_norm")] == list(range(10))
    assert found.data.params["peft/methods/default/target_r"] == "2"
    assert found.data.tags["peft.base"] == "Toy"
    assert "ranks.png" in [Path(f.path).name for f in client.list_artifacts(run_id, "default")]
    assert sorted(f.path for f in client.list_artifacts(run_id, "adapters")) == ["adapters/step-10", "adapters/step-3"]
    folder = client.download_artifacts(run_id, "adapters/step-10", str(tmp_path))
    fresh, x = Toy(), torch.randn(4, 16)
    lp.load_adapter(fresh, folder)
    torch.testing.assert_close(fresh.eval()(x), run.lightning_module.eval()(x))

    other = trainer(tmp_path, method=adalora(), logger=logger(), enable_checkpointing=False)
    with pytest.warns(UserWarning, match=rf"although the checkpoint belongs to run {run_id}\. To continue"):
        other.fit(Toy(), loader(), ckpt_path=tmp_path / "step=3.ckpt")
    elsewhere = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.warns(UserWarning, match=f"MLflow run {run_id} of the checkpoint cannot be continued"):
        resume_runs([elsewhere], tmp_path / "step=3.ckpt")
