"""Every method trains under DDP, FSDP2 and tensor parallelism as on one device, also in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.strategies import ROWS, STRATEGIES

ROOT = Path(__file__).parents[2]


def test_on_two_processes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(__file__).with_name("sharded_methods_run.py")), str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=600)
    assert (tmp_path / "out.json").exists(), ran.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.pop("fingerprint") == {"same": True, "values": 10, "gathered": 0}
    relay = found.pop("relay")
    assert len(relay) == 14
    assert not {stage: difference for stage, difference in relay.items() if difference > 1e-6}
    compared, facts = found.pop("FSDP1")
    assert len(compared) == 7
    assert not {name: difference for name, difference in compared.items() if difference > 1e-6}
    assert facts.pop("share") == 0.5
    assert facts.pop("mixed") == ["torch.float32"]
    expected = {
        "moved": "blocks.0.up.weight changed without gradients",
        "merged": "this process does not have the weights to merge into",
        "wrapped": "blocks.0 was wrapped in FullyShardedDataParallel by your code",
        "other base": "the values of 'blocks.1.down.weight' differ",
    }
    assert all(expected[name] in facts.pop(name) for name in [*facts])
    compared, errors = found.pop("tensor parallel")
    assert found.keys() == {f"{method}, {how}" for method in ROWS for how in STRATEGIES}
    assert not {name: result for name, result in found.items() if isinstance(result, str) or result > 1e-5}
    assert not {name: difference for name, difference in compared.items() if difference > 1e-6}
    assert len(compared) == 17
    assert "Call parallelize_module first" in errors["apply first"]
    assert "lp.rows is not supported on a Linear whose input is distributed" in errors["rows"]
