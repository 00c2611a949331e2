"""Distributed runs with two CPU processes: one run per strategy, checked by several tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
KINDS = ("ddp", "fsdp2", "fsdp2-shards")


@pytest.fixture(scope="module", params=KINDS)
def run(request: Any, tmp_path_factory: Any) -> tuple[str, Path, dict[str, Any]]:
    # Each run is made once, by the first xdist worker that needs it.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"distributed-{request.param}"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + 300
        while not (folder / "done").exists() and time.monotonic() < end:
            time.sleep(0.2)
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = [str(Path(__file__).with_name("distributed_run.py")), request.param, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
        (folder / "log").write_text(ran.stderr)
        (folder / "done").touch()
    assert (folder / "out.json").exists(), (folder / "log").read_text()[-4000:]
    return request.param, folder, json.loads((folder / "out.json").read_text())


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def test_checkpoints_hold_the_trainable_state_only(run: tuple[str, Path, dict[str, Any]]) -> None:
    kind, folder, out = run
    assert out["total"] > 4_000_000
    for path in [*(folder / "full").iterdir(), *(folder / "weights").iterdir()]:
        assert size(path) <= 4 * out["trainable"] + 1_000_000, path
        if kind != "fsdp2-shards":
            state = torch.load(path, weights_only=True)["state_dict"]
            assert all(tensor.numel() for tensor in state.values())
            assert {k for k in state if ".adapters." not in k} == {"head.weight", "head.bias", "seen"}
            assert len(state) == 9


def test_an_adapter_is_saved_whole_by_the_first_rank(run: tuple[str, Path, dict[str, Any]]) -> None:
    kind, folder, out = run
    saved = {key: right for key, right in out.items() if key.startswith("saved ")}
    assert saved == {"saved adapter": True, **({"saved alone": True} if kind == "ddp" else {})}
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]


def test_ranks_agree(run: tuple[str, Path, dict[str, Any]]) -> None:
    kind, _, out = run
    if kind == "ddp":  # sharded parameters cannot be compared between ranks
        assert {"start", "step 1", "step 6", "resumed 2, start", "resumed 2, step 3"} <= out["agree"].keys()
    assert all(out["agree"].values())


def test_resume_is_exact(run: tuple[str, Path, dict[str, Any]]) -> None:
    # Weights, optimizer state, the dropout of every rank and the order of samples agree, although the seed differs on
    # resume.
    killed = {"killed": [True, True]} if run[0] == "fsdp2-shards" else {}
    assert run[2]["resumed"] == {step: [True, True] for step in ("2", "3", "4")} | killed
    assert run[2]["resumed draws"]


def test_weights_only_checkpoints_load(run: tuple[str, Path, dict[str, Any]]) -> None:
    assert run[2]["validated"] == pytest.approx(run[2]["expected"], abs=1e-7)


def test_state_that_does_not_fit_is_an_error(run: tuple[str, Path, dict[str, Any]]) -> None:
    kind, _, out = run
    assert "r=4" in out["rank"]
    assert "r=2" in out["rank"]
    assert "different base model" in out["base"]
    assert "seed" in out["uneven seed"]
    assert out["uneven seed"].startswith("AuditError: rank 1")
    if kind == "ddp":
        assert "lora_A" in out["uneven weights"]


def test_damaged_sharded_checkpoints_name_the_file(run: tuple[str, Path, dict[str, Any]]) -> None:
    kind, folder, out = run
    if kind == "fsdp2-shards":
        assert set(out["damaged"]) == {"bit", "cut", "removed", "mixed", "metadata"}
        for how, said in out["damaged"].items():
            file = ".metadata" if how == "metadata" else "__0_0.distcp"
            assert said.startswith(f"StateError: {folder}/damaged/{how}/{file} "), said
            assert ("is missing" if how == "removed" else "has changed since it was saved") in said
        assert out["left"] == [[], [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]]
