"""Two processes, started as users start them: by torchrun and SLURM on two nodes, and by Lightning in three ways."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.tasks import TextClassifier
from tests.data.tables import POLITE, write
from tests.trainer.toys import Toy

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("launch_run.py"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def fit(recipe: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    """The command line's fit of a few steps, started by a script of recipes/clusters."""
    write("train.csv", [{"text": text, "label": text[0]} for text in POLITE * 4])
    short = ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(folder), "--data.batch_size", "4"]
    data = ["--data.source", "train.csv", "--data.validation_fraction", "0.5"]
    arguments = ["--config", str(ROOT / "recipes/quickstart.yaml"), *short, *data]
    return start(["bash", str(ROOT / "recipes/clusters" / recipe), *arguments], PYTHON=sys.executable, **more)


def torchrun(folder: Path) -> list[subprocess.Popen[str]]:
    """One launcher per node."""
    where = {"NODES": "2", "PROCESSES": "1", "HOST": f"127.0.0.1:{free_port()}"}
    return [fit("torchrun.sh", folder, **where) for _ in range(2)]


def slurm(folder: Path) -> list[subprocess.Popen[str]]:
    """A srun that starts the task of one node, once for each of two nodes."""
    srun = folder / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "run", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    job |= {"MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    job |= {"PATH": f"{srun.parent}:{os.environ['PATH']}"}
    return [fit("slurm.sh", folder, **job, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank)) for rank in range(2)]


@pytest.mark.parametrize("nodes", [torchrun, slurm])
def test_the_recipes_of_clusters_train_on_two_nodes(tmp_path: Path, nodes: Callable) -> None:
    processes = nodes(tmp_path)
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert "Starting with 2 processes" in said[0] + said[1]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    module = lp.load_from_checkpoint(TextClassifier, checkpoint)
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for n, p in module.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("how", ["script", "spawn", "fork"])
def test_two_processes_train_and_save_one_checkpoint(tmp_path: Path, how: str) -> None:
    process = start([sys.executable, SCRIPT, how, str(tmp_path)])
    text = process.communicate(timeout=240)[0]
    assert "ended, 2 processes" in text, text[-3000:]
    if how == "fork":  # a second run, of which rank 1 raises an error, follows the first
        assert process.returncode == 1
        assert "ValueError: this rank dies on purpose" in text
    else:
        assert process.returncode == 0
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["end.ckpt"]
    module = lp.load_from_checkpoint(Toy, tmp_path / "end.ckpt")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for n, p in module.named_parameters() if "lora_B" in n)
