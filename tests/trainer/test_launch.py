"""Two processes, started as users start them: by torchrun and SLURM on two nodes, and by Lightning in three ways."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_peft as lp
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


def torchrun(folder: Path) -> list[subprocess.Popen[str]]:
    """One launcher per node."""
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "run"]
    size = ["--nnodes", "2", "--nproc-per-node", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *size, *where, SCRIPT, "torchrun", str(folder)]
    return [start(command) for _ in range(2)]


def slurm(folder: Path) -> list[subprocess.Popen[str]]:
    """Two tasks on two nodes, with the environment that srun gives them."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "run", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    job |= {"MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    task = [sys.executable, SCRIPT, "slurm", str(folder)]
    return [start(task, **job, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank)) for rank in range(2)]


def script(folder: Path, how: str) -> list[subprocess.Popen[str]]:
    return [start([sys.executable, SCRIPT, how, str(folder)])]


START = {"torchrun": torchrun, "slurm": slurm}


@pytest.mark.parametrize("how", ["torchrun", "slurm", "script", "spawn", "fork"])
def test_two_processes_train_and_save_one_checkpoint(tmp_path: Path, how: str) -> None:
    processes = START[how](tmp_path) if how in START else script(tmp_path, how)
    said = [process.communicate(timeout=240)[0] for process in processes]
    for process, text in zip(processes, said):
        assert f"ended, 2 processes, {2 if how in START else 1} nodes" in text, text[-3000:]
        if how == "fork":  # a second run, of which rank 1 raises an error, follows the first
            assert process.returncode == 1
            assert "ValueError: this rank dies on purpose" in text
        else:
            assert process.returncode == 0
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["end.ckpt"]
    module = lp.load_from_checkpoint(Toy, tmp_path / "end.ckpt")
    assert all(torch.isfinite(p).all() and p.abs().max() > 0 for n, p in module.named_parameters() if "lora_B" in n)
