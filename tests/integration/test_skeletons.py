"""Modules of eight fields, not written for this library, train, checkpoint, resume, export, merge and unload."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_peft as lp
from lightning_peft.cli.main import main
from tests.helpers import assert_same_bits, bits, close, differ
from tests.integration import skeletons as field_modules

BATCHES, BATCH = 3, 4


def ids(length: int = 6) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(3, 31, (length,), generator=g)


def noise(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g)


class Samples(Dataset):
    """Fixed random samples with one tensor per key."""

    def __init__(self, keys: dict[str, Callable[[torch.Generator], Tensor]]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.samples = [{key: make(generator) for key, make in keys.items()} for _ in range(BATCHES * BATCH)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


@dataclass
class Skeleton:
    """A module, the content of its batches, and the method that users of the field would attach."""

    module: type[L.LightningModule]
    batch: dict[str, Callable[[torch.Generator], Tensor]]
    method: dict[str, Any]
    trained: tuple[str, ...] = ()  # if parameters of the base train
    arguments: dict[str, Any] = field(default_factory=dict)  # arguments that a checkpoint cannot hold
    build: Callable[[], L.LightningModule] | None = None

    def make(self) -> L.LightningModule:
        return self.build() if self.build is not None else self.module(**self.arguments)

    def loader(self) -> DataLoader:
        return DataLoader(Samples(self.batch), batch_size=BATCH, shuffle=True)

    def lora(self) -> lp.LoRA:
        return lp.LoRA(r=2, dropout=0.1, seed=0, **self.method)


def from_command_line() -> L.LightningModule:
    optimizer = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01"]
    schedule = ["--model.scheduler=torch.optim.lr_scheduler.ExponentialLR", "--model.scheduler.gamma=0.9"]
    arguments = [*optimizer, *schedule, "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(field_modules.WithCallables, run=False, args=arguments, save_config_callback=None)
    return cli.model


CALLABLES = {"optimizer": torch.optim.AdamW, "scheduler": torch.optim.lr_scheduler.ConstantLR}
QV = ["q_proj", "v_proj"]
SKELETONS = {
    "causal LM": Skeleton(field_modules.CausalLM, {"input_ids": ids()}, {"targets": QV}),
    "projector": Skeleton(
        field_modules.Projector,
        {"pixel_values": noise(3, 8, 8), "input_ids": ids()},
        {"targets": ["llm.*.q_proj", "llm.*.v_proj"], "trainable": ["projector"]},
        ("projector.",),
    ),
    "callables": Skeleton(
        field_modules.WithCallables,
        {"input_ids": ids()},
        {"targets": ["c_attn"]},
        arguments=CALLABLES,
        build=from_command_line,
    ),
    "Whisper": Skeleton(
        field_modules.Whisper, {"input_features": noise(4, 16), "labels": ids(5)}, {"targets": [*QV, "fc1"]}
    ),
    "CLIP": Skeleton(
        field_modules.CLIP,
        {"pixel_values": noise(3, 8, 8), "input_ids": ids()},
        {"targets": QV, "trainable": ["visual_projection", "text_projection", "logit_scale"]},
        ("clip.visual_projection.", "clip.text_projection.", "clip.logit_scale"),
    ),
    "speech to LLM": Skeleton(
        field_modules.SpeechToLLM,
        {"audio": noise(120), "input_ids": ids()},
        {"targets": "all-linear", "exclude": ["speech", "adapter"], "trainable": ["adapter"]},
        ("adapter.",),
    ),
    "triplet": Skeleton(
        field_modules.Triplet,
        dict.fromkeys(("anchor", "positive", "negative"), ids()),
        {"targets": ["query", "value"], "exclude": ["pooler"]},
    ),
    "audio head": Skeleton(
        field_modules.AudioHead,
        {"spectrogram": noise(12, 8), "label": lambda g: torch.randint(3, (), generator=g)},
        {"targets": "all-linear", "trainable": ["classifier"]},
        ("classifier.",),
    ),
    "time series": Skeleton(
        field_modules.TimeSeries,
        {"past_values": noise(16, 2), "future_values": noise(4, 2)},
        {"targets": QV, "trainable": ["head"]},
        ("model.head.",),
    ),
}


def fit(folder: Path, skeleton: Skeleton, ckpt_path: Path | None = None) -> tuple[L.LightningModule, L.Trainer]:
    """Train two epochs with a checkpoint after every step, or the rest of them from ``ckpt_path``."""
    module, saver = skeleton.make(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    L.seed_everything(0 if ckpt_path is None else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            callbacks=[skeleton.lora(), saver],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loaders = [skeleton.loader()]
        if "validation_step" in vars(skeleton.module):
            loaders.append(skeleton.loader())
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    return module, trainer


@torch.no_grad()
def output(module: L.LightningModule, skeleton: Skeleton) -> Tensor:
    batch = next(iter(DataLoader(Samples(skeleton.batch), batch_size=BATCH)))
    return module.eval().predict_step(batch, 0)


def fresh(skeleton: Skeleton) -> L.LightningModule:
    module = skeleton.make()
    module.setup("predict")
    return module.eval()


def classes(module: nn.Module) -> list[str]:
    """Class names, because torch creates a class per instance for a parametrized layer."""
    return [f"{type(part).__module__}.{type(part).__qualname__}" for part in module.modules()]


@pytest.mark.parametrize("name", SKELETONS)
def test_skeleton(name: str, tmp_path: Path) -> None:
    skeleton = SKELETONS[name]
    base = fresh(skeleton)
    module, trainer = fit(tmp_path / "whole", skeleton)
    trained = output(module, skeleton)
    differ(trained, output(base, skeleton))

    # The base is unchanged bit for bit; the checkpoint holds only what trained.
    now, before = bits(module), bits(base)
    frozen = [k for k in before if not skeleton.trained or not k.startswith(skeleton.trained)]
    assert_same_bits({k: now[k] for k in frozen}, {k: before[k] for k in frozen})
    path = sorted((tmp_path / "whole").glob("step=*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))[-1]
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert stored.keys() == {k for k in now if k not in frozen}

    assert any(".adapters." in key for key in stored)

    # A run that stops in the middle of an epoch continues as if it had not stopped.
    steps = trainer.optimizers[0].state_dict()["state"]
    resumed, again = fit(tmp_path / "resumed", skeleton, tmp_path / "whole" / f"step={middle(skeleton)}.ckpt")
    assert_same_bits(bits(resumed), now)
    assert again.global_step == trainer.global_step
    assert_same_bits(
        {str((i, k)): v for i, s in again.optimizers[0].state_dict()["state"].items() for k, v in s.items()},
        {str((i, k)): v for i, s in steps.items() for k, v in s.items()},
    )

    # Load from the checkpoint alone, and export it in both ways onto an untrained base.
    loaded = lp.load_from_checkpoint(skeleton.module, path, **skeleton.arguments)
    assert torch.equal(output(loaded, skeleton), trained)
    lp.save_adapter(module, tmp_path / "adapter")
    main(["export", str(path), str(tmp_path / "exported")])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_same_bits(load_file(tmp_path / "exported" / "adapter_model.safetensors"), tensors)
    other = fresh(skeleton)
    lp.load_adapter(other, tmp_path / "exported")
    close(output(other, skeleton), trained)

    # Merging changes only the weights; unmerging restores them.
    lp.merge(module)
    close(output(module, skeleton), trained, 1e-4)
    lp.unmerge(module)
    assert_same_bits(bits(module), now)
    lp.unload(loaded, merge=True)
    close(output(loaded, skeleton), trained, 1e-4)
    assert classes(loaded) == classes(base)
    lp.unload(module)
    assert bits(module).keys() == before.keys()
    assert_same_bits(bits(module, frozen), {k: before[k] for k in frozen})
    assert classes(module) == classes(base)


def middle(skeleton: Skeleton) -> int:
    """The global step after the second batch, which counts the steps of all optimizers."""
    return 4 if skeleton.module is field_modules.AudioHead else 2
