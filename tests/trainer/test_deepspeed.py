"""DeepSpeed trains, saves and resumes as one device does; its stage 3 and flat parameters of FSDP1 are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy

from lightning_peft.trainer.resume.dataloaders import TrainingLoaders
from lightning_peft.trainer.strategy import adapt_strategy
from tests.trainer.toys import Toy, loader, trainer

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
@pytest.mark.parametrize(
    ("accelerator", "processes"), [("cpu", 2), pytest.param("gpu", 1, marks=[NO_GPU, pytest.mark.gpu])]
)
def test_stages_1_and_2(tmp_path: Path, accelerator: str, processes: int) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [str(Path(__file__).with_name("deepspeed_run.py")), accelerator, str(tmp_path)]
    more = {"DS_ACCELERATOR": "cpu"} if accelerator == "cpu" else {}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}
    ran = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "out.json").exists(), ran.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.pop("saved") == found.pop("trained")  # nothing of the frozen base
    assert "would never be updated" in found.pop("unheld")
    assert len(found) == 8
    assert not {name: difference for name, difference in found.items() if difference > 1e-6}


def test_deepspeed_stage_3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, enable_checkpointing=False)
    monkeypatch.setattr(type(run.strategy), "zero_stage_3", True, raising=False)
    with pytest.raises(MisconfigurationException, match="adapters would get empty ones"):
        run.fit(Toy(), loader())


def test_fsdp1_with_flat_parameters_is_refused() -> None:
    # A Trainer would refuse the strategy first without a GPU.
    run: Any = SimpleNamespace(strategy=FSDPStrategy(use_orig_params=False), state=SimpleNamespace(fn="fit"))
    with pytest.raises(MisconfigurationException, match="Remove the argument"):
        adapt_strategy(run, TrainingLoaders())
