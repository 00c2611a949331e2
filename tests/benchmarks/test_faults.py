"""A short run of the script that kills and resumes runs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_resume_exactly(tmp_path):
    # In a separate process, because it forks, which is safe only before torch has started threads.
    page = tmp_path / "faults.md"
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", "3", "--method", "lora_dropout"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, "--markdown", str(page)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert "\n3 kills (" in page.read_text()
