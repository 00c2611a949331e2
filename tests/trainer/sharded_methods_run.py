"""Every method under DDP, FSDP2 and tensor parallelism, on two CPU processes; test_sharded_methods.py starts it."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lightning_peft as lp
from benchmarks.faults import Module, inside_net, kind_of
from lightning_peft.core.record import injection_state
from lightning_peft.core.state.fingerprint import fingerprint
from tests.kinds import KINDS
from tests.strategies import ROWS, STRATEGIES
from tests.table import METHODS as TABLE
from tests.trainer import fsdp1
from tests.trainer.relay import relay, strategy_of
from tests.trainer.tensor_parallel import Block, compare, full_values

# These plans take and return whole activations, so that any layer of any model can be split.
_BY_COLUMN, _BY_ROW = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())


class Sharded(Module):
    """The module of the fault tests, which distributes itself as ``how`` says."""

    def __init__(self, kind: str, how: str) -> None:
        super().__init__(kind)
        self.how = how

    def configure_model(self) -> None:
        if self.how == "FSDP2" and not isinstance(self, FSDPModule):
            lp.apply(self)
            for part in [*(m for m in self.net.children() if type(m) is not nn.ModuleList), self]:
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        elif self.how == "tensor parallel" and injection_state(self) is None:
            # nn.MultiheadAttention reads its out_proj without calling it, so no plan can split that layer.
            linear = [m for m in self.net.modules() if type(m) is nn.Linear]
            for layer, style in zip(linear, itertools.cycle([_BY_COLUMN, _BY_ROW])):
                parallelize_module(layer, self.device_mesh["tensor_parallel"], style)


def fit_method(method: str, how: str) -> dict[str, torch.Tensor]:
    """Fit the same batches on both ranks; return all parameters."""
    kind = kind_of(ROWS[method])
    options: dict[str, Any] = {"devices": 1}
    if how != "plain":
        options = {"devices": 2, "strategy": strategy_of(how)}
    L.seed_everything(3, verbose=False)
    module = Sharded(kind, how)
    made = TABLE[ROWS[method]].make(inside_net(KINDS[kind]))
    quick_trainer(made, max_epochs=1, limit_val_batches=0, **options).fit(module)
    return full_values(module)


def quick_trainer(method: lp.PEFTMethod, **options: Any) -> L.Trainer:
    quiet = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    return L.Trainer(
        accelerator="cpu", callbacks=[method], logger=False, use_distributed_sampler=False, **quiet, **options
    )


def every_method() -> dict[str, Any]:
    """The largest difference of each method from one device, by method and strategy; or its error."""
    found: dict[str, Any] = {}
    for method in ROWS:
        plain = fit_method(method, "plain")
        for how in STRATEGIES:
            try:
                values = fit_method(method, how)
                assert plain.keys() == values.keys()
                found[f"{method}, {how}"] = max((plain[k] - values[k]).abs().max().item() for k in plain)
            except Exception as error:
                found[f"{method}, {how}"] = f"{type(error).__name__}: {error}"
    return found


def fingerprint_of_shards() -> dict[str, Any]:
    """The fingerprint of a sharded base compared with that of the whole, and the number of gathered tensors."""
    torch.manual_seed(7)
    model = nn.Sequential(Block(), nn.Linear(16, 3), nn.Conv1d(3, 5, 2))  # 3 and 5 do not divide by two ranks
    lp.apply(model, lp.LoRA(r=2, targets=["up"]))
    whole, gathered = fingerprint(model), []
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    full_tensor = DTensor.full_tensor
    DTensor.full_tensor = lambda self: gathered.append(self) or full_tensor(self)  # type: ignore[method-assign]
    try:
        return {"same": fingerprint(model) == whole, "values": len(whole["values"]), "gathered": len(gathered)}
    finally:
        DTensor.full_tensor = full_tensor  # type: ignore[method-assign]


def main(out: Path) -> None:
    found = every_method()
    found["tensor parallel"] = compare(out.parent)
    found["relay"] = relay(out.parent)
    found["FSDP1"] = fsdp1.compare(out.parent)
    found["fingerprint"] = fingerprint_of_shards()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads must not outlive the interpreter


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
