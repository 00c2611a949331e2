"""Mutate files and read them: each must load with equal values, or raise an error of this package that names the file.

    python -m benchmarks.fuzz --mutations 2000 --markdown benchmarks/results/fuzz.md

Bytes are flipped, cut, zeroed or moved; values are exchanged, deleted or replaced. Kinds that end in ``, old`` have no
digests, like files of earlier releases and of PEFT. In these a changed value may be undetected, which is counted.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import json
import random
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import lightning_peft as lp
from lightning_peft.formats.directory.files import CONFIG, WEIGHTS
from lightning_peft.formats.directory.seal import KEY as DIGESTS
from lightning_peft.trainer.checkpoints.manifest import KEY, manifest, sealed
from lightning_peft.trainer.checkpoints.sharded import _load_directory
from lightning_peft.trainer.checkpoints.sharded_folder import FILES, META, save_folder
from lightning_peft.trainer.module import adapt_module

OURS = (lp.StateError, lp.FormatError, lp.TargetError, lp.InjectionError)
GOOD = ("equal", "refused", "differs, no digest")
LIMIT = 60  #: seconds for one file, after which the process ends with a traceback

HOSTILE = [
    None,
    True,
    0,
    -1,
    3,
    2**40,
    10**30,
    1.5,
    float("inf"),
    "",
    "x",
    "re:(a+)+$",
    "os.system",
    "../../x",
    "\ud800",
]
HOSTILE += [[], {}, [0], [[]], {"class_path": "os.system"}, {"": {}}, [None] * 3]


class Module(L.LightningModule):
    """A small network with fixed weights."""

    def __init__(self, width: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.body(x))


class Subject:
    """A trained module, with its checkpoint and adapter directory in ``folder``, which are mutated."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.x = folder, torch.randn(4, 8)
        self.trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        module = Module()
        lp.apply(module, lp.LoRA(r=2, dropout=0.1, trainable=["head"]))
        with torch.no_grad():
            for parameter in lp.trainable_parameters(module):
                parameter.add_(torch.randn_like(parameter))
        adapt_module(module)
        self.expected = self.output(module)
        state = lp.adapter_state(module)
        self.checkpoint = {"state_dict": state, KEY: sealed(manifest(module), state), "hyper_parameters": {"width": 8}}
        self.checkpoint |= {"pytorch-lightning_version": L.__version__, "epoch": 1, "global_step": 2}
        lp.save_adapter(module, folder / "saved")
        torch.save(self.checkpoint, folder / "saved.ckpt")
        self.save_shards(copy.deepcopy(module))

    def output(self, module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return module.eval()(self.x)

    def read_checkpoint(self) -> torch.Tensor:
        return self.output(lp.load_from_checkpoint(Module, self.folder / "x.ckpt"))

    def read_directory(self) -> torch.Tensor:
        module = Module()
        lp.load_adapter(module, self.folder / "x")
        return self.output(module)

    def save_shards(self, module: nn.Module) -> None:
        """Write a sharded checkpoint as ``ModelParallelStrategy`` does, with one process and so one shard."""
        optimizer = torch.optim.AdamW(lp.trainable_parameters(module), lr=0.25)
        module(self.x).square().sum().backward()
        optimizer.step()
        state = {name: value.clone() for name, value in lp.adapter_state(module).items()}
        checkpoint = {**self.checkpoint, "state_dict": state, KEY: {**sealed(manifest(module), {})}}
        del checkpoint[KEY]["digests"]["tensors"]  # no process of several has a whole tensor
        checkpoint["optimizer_states"] = [get_optimizer_state_dict(module, optimizer)]
        strategy = SimpleNamespace(is_global_zero=True, barrier=lambda: None)
        save_folder(strategy, checkpoint, self.folder / "saved.shards")
        self.sharded = self.numbers(module, optimizer)

    def numbers(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """The output, and the optimizer's averages."""
        averages = [optimizer.state[p]["exp_avg"].flatten() for p in lp.trainable_parameters(module)]
        return torch.cat([self.output(module).flatten(), *averages])

    def read_shards(self) -> torch.Tensor:
        """Load the sharded checkpoint for a fit."""
        module = Module()
        lp.apply(module, lp.LoRA(r=2, dropout=0.1, trainable=["head"]))
        adapt_module(module)
        module.trainer = self.trainer
        self.trainer.ckpt_path = str(self.folder / "x")
        self.trainer.state.fn = TrainerFn.FITTING
        optimizer = torch.optim.AdamW(lp.trainable_parameters(module), lr=0.25)
        strategy = SimpleNamespace(lightning_module=module, optimizers=[optimizer])
        _load_directory(strategy, self.folder / "x", weights_only=True)
        return self.numbers(module, optimizer)

    def copy_shards(self) -> Path:
        shutil.rmtree(self.folder / "x", ignore_errors=True)
        return Path(shutil.copytree(self.folder / "saved.shards", self.folder / "x"))

    def copy_directory(self) -> Path:
        shutil.rmtree(self.folder / "x", ignore_errors=True)
        return Path(shutil.copytree(self.folder / "saved", self.folder / "x"))


def flip(data: bytes, draw: random.Random) -> bytes:
    """One mutation of bytes."""
    at, length, changed = draw.randrange(len(data)), draw.choice([1, 2, 8, 64, 512]), bytearray(data)
    kind = draw.choice(["bit", "bit", "byte", "zero", "cut", "remove", "repeat", "swap"])
    if kind == "bit":
        changed[at] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        changed[at] = draw.randrange(256)
    elif kind == "zero":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == "cut":
        del changed[at:]
    elif kind == "remove":
        del changed[at : at + length]
    elif kind == "repeat":
        changed[at:at] = changed[at : at + length]
    else:
        to = draw.randrange(len(data))
        changed[at : at + 1], changed[to : to + 1] = changed[to : to + 1], changed[at : at + 1]
    return bytes(changed)


def change(value: Any, draw: random.Random) -> Any:
    """Mutate a nested value at one place, in place if possible."""
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        here = left.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        places += [(here, key) for key in keys]
        left += [here[key] for key in keys]
    holder, key = draw.choice(places)
    other, other_key = draw.choice(places)
    kind = draw.choice(["delete", "replace", "replace", "exchange", "rename"])
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw.choice(["x", "", 3, f"{key}x"])] = holder.pop(key)
    elif kind == "exchange":
        holder[key] = copy.deepcopy(other[other_key])
    else:
        holder[key] = copy.deepcopy(draw.choice(HOSTILE))
    return value


def _listed(value: Any) -> Any:
    """A copy with lists instead of tuples, so that it can be changed."""
    if isinstance(value, dict):
        return {key: _listed(inside) for key, inside in value.items()}
    return [_listed(inside) for inside in value] if isinstance(value, list | tuple) else value


def checkpoint_bytes(subject: Subject, draw: random.Random) -> torch.Tensor:
    (subject.folder / "x.ckpt").write_bytes(flip((subject.folder / "saved.ckpt").read_bytes(), draw))
    return subject.read_checkpoint()


def checkpoint_values(subject: Subject, draw: random.Random, old: bool = False) -> torch.Tensor:
    value = _listed(subject.checkpoint)
    if old:
        del value[KEY]["digests"]
    hyper_parameters = value.pop("hyper_parameters")  # hyperparameters belong to the user's module and may be edited
    torch.save({"hyper_parameters": hyper_parameters, **change(value, draw)}, subject.folder / "x.ckpt")
    return subject.read_checkpoint()


def tensor_bytes(subject: Subject, draw: random.Random) -> torch.Tensor:
    path = subject.copy_directory() / WEIGHTS
    path.write_bytes(flip(path.read_bytes(), draw))
    return subject.read_directory()


def tensor_values(subject: Subject, draw: random.Random, old: bool = False) -> torch.Tensor:
    path = subject.copy_directory() / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if old:
        del metadata[DIGESTS]
    one, other = draw.sample(sorted(tensors), 2)
    kind = draw.choice(["exchange", "change", "delete", "rename", "dtype", "reshape"])
    if kind == "exchange":
        tensors[one], tensors[other] = tensors[other], tensors[one]
    elif kind == "change":
        tensors[one].view(-1)[draw.randrange(tensors[one].numel())] += draw.choice([1e-3, 1.0, 1e30])
    elif kind == "delete":
        del tensors[one]
    elif kind == "rename":
        tensors[draw.choice([f"{one}x", "x", one.replace("0", "9"), one.replace("lora_A", "lora_B")])] = tensors.pop(
            one
        )
    elif kind == "dtype":
        tensors[one] = tensors[one].to(draw.choice([torch.float16, torch.float64, torch.int8, torch.bool]))
    else:
        tensors[one] = tensors[one].reshape(draw.choice([(-1,), (1, -1), (-1, 1)]))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return subject.read_directory()


def config_bytes(subject: Subject, draw: random.Random) -> torch.Tensor:
    path = subject.copy_directory() / CONFIG
    path.write_bytes(flip(path.read_bytes(), draw))
    return subject.read_directory()


def config_values(subject: Subject, draw: random.Random, old: bool = False) -> torch.Tensor:
    folder = subject.copy_directory()
    if old:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(change(config, draw), default=str))
    return subject.read_directory()


def shard_bytes(subject: Subject, draw: random.Random, old: bool = False) -> torch.Tensor:
    folder = subject.copy_shards()
    if old:
        meta = torch.load(folder / META, weights_only=True)
        del meta[FILES]
        torch.save(meta, folder / META)
    path = draw.choice(sorted(p for p in folder.iterdir() if not old or p.name != META))
    path.write_bytes(flip(path.read_bytes(), draw))
    return subject.read_shards()


def shard_values(subject: Subject, draw: random.Random) -> torch.Tensor:
    folder = subject.copy_shards()
    torch.save(change(_listed(torch.load(folder / META, weights_only=True)), draw), folder / META)
    return subject.read_shards()


KINDS: dict[str, Callable[[Subject, random.Random], torch.Tensor]] = {
    "checkpoint, bytes": checkpoint_bytes,
    "checkpoint, values": checkpoint_values,
    "checkpoint, values, old": lambda subject, draw: checkpoint_values(subject, draw, old=True),
    "tensors, bytes": tensor_bytes,
    "tensors, values": tensor_values,
    "tensors, values, old": lambda subject, draw: tensor_values(subject, draw, old=True),
    "config, bytes": config_bytes,
    "config, values": config_values,
    "config, values, old": lambda subject, draw: config_values(subject, draw, old=True),
    "shards, bytes": shard_bytes,
    "shards, values": shard_values,
    "shards, bytes, old": lambda subject, draw: shard_bytes(subject, draw, old=True),
}


def outcome(subject: Subject, kind: str, seed: int) -> str:
    """The outcome of reading one mutated file."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = KINDS[kind](subject, random.Random(f"{kind}{seed}"))
        expected = subject.sharded if kind.startswith("shards") else subject.expected
        if found.shape == expected.shape and torch.equal(found, expected):
            return "equal"
        return "differs, no digest" if kind.endswith("old") else "WRONG NUMBERS"
    except OURS as error:
        return "refused" if str(subject.folder / "x") in str(error) else f"NOT NAMED {str(error)[:120]}"
    except Exception as error:
        return f"BARE {type(error).__name__}: {str(error)[:120]}"
    finally:
        faulthandler.cancel_dump_traceback_later()


def table(found: dict[str, collections.Counter[str]], mutations: int) -> str:
    """The page of results."""

    def row(kind: str, counts: collections.Counter[str]) -> str:
        bad = sum(n for what, n in counts.items() if what not in GOOD)
        return f"| {kind} | {' | '.join(f'{counts[what]:,}' for what in GOOD)} | {bad} |"

    lines = [
        "# Mutated files",
        "",
        f"`python -m benchmarks.fuzz --mutations {mutations}` (see its docstring) wrote this page (torch",
        f"{torch.__version__.partition('+')[0]}, Lightning {L.__version__}). Refused: an error of this package that",
        "names the file. Equal: the mutation changed nothing that is read. Bad: a wrong load, another error, or one",
        "without the name.",
        "",
        f"| kind of file | {' | '.join(GOOD)} | bad |",
        "|---|---|---|---|---|",
        *(row(kind, counts) for kind, counts in found.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print a line for each kind of file; exit with 1 if there was a bad outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000, help="number of mutations of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first mutation")
    parser.add_argument("--markdown", type=Path, help="write the page of results to this file")
    options = parser.parse_args()
    bad, found = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(Path(folder).resolve())
        for kind in KINDS:
            seeds = range(options.seed, options.seed + options.mutations)
            found[kind] = counts = collections.Counter(outcome(subject, kind, seed) for seed in seeds)
            print(f"{kind}: " + ", ".join(f"{n:,} {what}" for what, n in counts.most_common()), flush=True)
            bad += sum(n for what, n in counts.items() if what not in GOOD)
            if options.markdown:
                options.markdown.write_text(table(found, options.mutations))
    print(
        f"{bad:,} bad outcomes; at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory"
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
