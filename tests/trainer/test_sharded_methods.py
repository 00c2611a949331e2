"""Every method trains under DDP and FSDP2 as on one device; tensor parallelism of adapted layers is refused."""

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
    ran = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "out.json").exists(), ran.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.pop("fingerprint") == {"same": True, "values": 10, "gathered": 0}
    refused = {name: said for name, said in found.items() if isinstance(said, str)}
    assert len(refused) == 6
    for said in refused.values():
        assert "Leave adapted layers out of the plan of parallelize_module" in said
    apart = {name: difference for name, difference in found.items() if name not in refused and difference > 1e-5}
    assert not apart
    assert found.keys() - refused == {"beside", *(f"{method}, {how}" for method in ROWS for how in STRATEGIES)}
