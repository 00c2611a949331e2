"""Measure the bytes of checkpoints under each strategy, and the bytes that train; write the table of the docs.

    python -m benchmarks.checkpoint_bytes --write docs/strategies.md

A LoRA and a head train with AdamW on the module of ``tests/trainer/distributed_run.py``, in two gloo processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.trainer.distributed_run import Big, strategy_of
from tests.trainer.toys import loader, lora, trainer

#: name in the table -> name in tests/trainer/distributed_run.py, and number of processes
STRATEGIES = {
    "one device": ("", 1),
    "DDP": ("ddp", 2),
    "FSDP2, one file": ("fsdp2", 2),
    "FSDP2, `save_distributed_checkpoint=True`": ("fsdp2-shards", 2),
}
BEGIN, END = "<!-- measured: python -m benchmarks.checkpoint_bytes -->\n", "<!-- end measured -->"


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def measure(kind: str, folder: Path) -> None:
    """Train two steps in this process, one of several, and write the sizes to ``folder``."""
    L.seed_everything(3, verbose=False)
    options: dict[str, Any] = {"devices": 2, "strategy": strategy_of(kind)} if kind else {}
    module = Big(shard=kind.startswith("fsdp2"))
    run = trainer(folder, method=lora(), max_steps=2, enable_checkpointing=False, **options)
    run.fit(module, loader(num_workers=0))
    for name in ("full", "weights"):
        run.save_checkpoint(folder / name / "x.ckpt", weights_only=name == "weights")
    found = {name: sum(map(size, (folder / name).iterdir())) for name in ("full", "weights")}
    parameters = list(module.parameters())  # for a sharded tensor, this is the size of the whole tensor
    found["trainable"] = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    found["model"] = sum(p.numel() * p.element_size() for p in parameters)
    if run.is_global_zero:
        (folder / "sizes.json").write_text(json.dumps(found))


def launch(kind: str, processes: int) -> dict[str, int]:
    """Run :func:`measure` in ``processes`` processes, and return the sizes."""
    with tempfile.TemporaryDirectory() as folder:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(start if kind else []), "-m", "benchmarks.checkpoint_bytes"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([*command, "--kind", kind, "--folder", folder], env=environment, check=True)
        return json.loads((Path(folder) / "sizes.json").read_text())


def table(rows: dict[str, dict[str, int]]) -> str:
    """The table, as Markdown."""
    columns = {"trainable": "trainable bytes", "model": "full model", "full": "checkpoint"}
    columns |= {"weights": "`save_weights_only=True`"}
    return "\n".join(
        [
            f"| strategy | {' | '.join(columns.values())} |",
            f"|---|{'---|' * len(columns)}",
            *(f"| {name} | {' | '.join(f'{row[key]:,}' for key in columns)} |" for name, row in rows.items()),
        ]
    )


def main() -> None:
    """Measure every strategy and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="replace the table in this page")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        measure(options.kind, options.folder)
        return
    found = table({name: launch(*how) for name, how in STRATEGIES.items()})
    print(found)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        options.write.write_text(f"{before}{BEGIN}\n{found}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
