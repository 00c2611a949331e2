"""A run that stops and resumes ends bit for bit like one that never stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset, WeightedRandomSampler

from tests.trainer.toys import Noisy, Stream, Toy, data, every_step, loader, lora, same, state_of, trainer, val_loader


class Augmented(Stream):
    def __len__(self) -> int:
        return 40


def seeded(**options: Any) -> Any:
    return loader(generator=torch.Generator().manual_seed(5), **options)


def batch_sampled() -> Any:
    dataset = TensorDataset(*data())
    return torch.utils.data.DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 8, True))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (loader, {}),
    "one worker": (lambda: loader(num_workers=1), {}),
    "augmentation": (lambda: loader(Noisy()), {}),
    "augmentation in a worker": (lambda: loader(Noisy(), num_workers=1), {}),
    "augmentation in two workers": (lambda: loader(Noisy(), num_workers=2), {}),
    "persistent worker": (lambda: loader(Noisy(), num_workers=1, persistent_workers=True), {}),
    "own generator": (seeded, {}),
    "own generator and worker": (lambda: seeded(num_workers=1), {}),
    "weighted sampler": (lambda: loader(sampler=WeightedRandomSampler(torch.arange(1.0, 41.0), 40)), {}),
    "batch sampler": (batch_sampled, {}),
    "iterable": (lambda: loader(Stream()), {}),
    "iterable in a worker": (lambda: loader(Stream(), num_workers=1), {}),
    "iterable with a length": (lambda: loader(Augmented()), {}),
    "dict of loaders": (lambda: {"a": loader(), "b": loader(Noisy(16))}, {}),
    "list of loaders": (lambda: [loader(Noisy(24)), loader()], {}),
    "dict with an iterable": (lambda: {"a": loader(Stream()), "b": loader(Noisy(16))}, {}),
    "accumulation": (loader, {"accumulate_grad_batches": 2}),
    "clipping": (loader, {"gradient_clip_val": 0.05}),
    "often validated": (loader, {"val_check_interval": 0.4}),
    "counted in steps": (loader, {"max_epochs": -1, "max_steps": 10}),
    "limited batches": (loader, {"limit_train_batches": 3}),
    "reloaded loaders": (loader, {"reload_dataloaders_every_n_epochs": 1}),
}
ALL_STOPS = {"plain", "augmentation in two workers", "iterable", "accumulation"}


def fit(root: Path, train: Any, options: dict[str, Any], *callbacks: Any, ckpt: Path | None = None) -> dict[str, Any]:
    L.seed_everything(3 if ckpt is None else 99, verbose=False)
    module, run = Toy(), trainer(root, *callbacks, enable_checkpointing=bool(callbacks), **options)
    run.fit(module, train(), val_loader(), ckpt_path=ckpt)
    return state_of(module, run)


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(tmp_path: Path, case: str) -> None:
    train, options = CASES[case]
    expected = fit(tmp_path, train, options, *every_step(tmp_path))
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert any("end" in p.name for p in saved)
    assert any("step" in p.name for p in saved)
    chosen = saved if case in ALL_STOPS else [p for p in saved if p.stem in {"step=2", "step=6", "end-epoch=0"}]
    for path in chosen:
        assert same(fit(tmp_path, train, options, ckpt=path), expected), path.name


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 3, "accumulate_grad_batches": 2}])
def test_checkpoints_saved_in_validation(tmp_path: Path, options: dict[str, Any]) -> None:
    # If validation runs in the middle of gradient accumulation, the checkpoint holds the gradients so far.
    save = ModelCheckpoint(
        tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False
    )
    expected = fit(tmp_path, loader, options, save)
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) >= 2
    for path in saved:
        assert same(fit(tmp_path, loader, options, ckpt=path), expected), path.name


def test_save_last_and_resume_of_a_resume(tmp_path: Path) -> None:
    expected = fit(tmp_path / "a", loader, {"max_epochs": 3}, *every_step(tmp_path / "a"))
    again = fit(
        tmp_path / "b",
        lambda: loader(),
        {"max_epochs": 3},
        ModelCheckpoint(tmp_path / "b", every_n_train_steps=2, save_top_k=-1, save_last=True, filename="{step}"),
        ckpt=tmp_path / "a" / "step=3.ckpt",
    )
    assert same(again, expected)
    for name in ("step=4.ckpt", "step=8.ckpt", "last.ckpt"):
        assert same(fit(tmp_path / "c", loader, {"max_epochs": 3}, ckpt=tmp_path / "b" / name), expected), name


def test_resume_in_a_fresh_process(tmp_path: Path) -> None:
    expected = fit(tmp_path, loader, {}, *every_step(tmp_path))
    script = (
        "import sys, torch; from pathlib import Path; from tests.trainer.resume import test_resume as t\n"
        "root = Path(sys.argv[1])\n"
        "torch.save(t.fit(root, t.loader, {}, ckpt=root / 'step=3.ckpt'), root / 'state.pt')"
    )
    package = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=package, check=True, capture_output=True)
    assert same(torch.load(tmp_path / "state.pt"), expected)


def test_seen_samples_are_not_loaded_again(tmp_path: Path) -> None:
    fit(tmp_path, loader, {}, *every_step(tmp_path))
    dataset = Noisy()
    loaded: list[int] = []
    dataset.__class__ = type(
        "Counting", (Noisy,), {"__getitem__": lambda s, i: loaded.append(i) or Noisy.__getitem__(s, i)}
    )
    fit(tmp_path, lambda: loader(dataset), {"max_epochs": 1}, ckpt=tmp_path / "step=3.ckpt")
    assert len(loaded) == 16


class Gan(Toy):
    """Manual optimization with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        adapters = [p for n, p in self.named_parameters() if "adapters" in n]
        return torch.optim.SGD(adapters, lr=0.1), torch.optim.Adam(self.head.parameters(), lr=0.01)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> dict[str, Any]:
        L.seed_everything(3 if ckpt is None else 99, verbose=False)
        module = Gan()
        save = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", every_n_train_steps=2, save_top_k=-1)
        r = trainer(tmp_path, *([save] if ckpt is None else []), method=lora())
        r.fit(module, loader(), ckpt_path=ckpt)
        return state_of(module, r)

    expected = run()
    for path in sorted(tmp_path.glob("epoch*.ckpt")):
        assert same(run(path), expected), path.name


def test_plain_lightning_is_not_changed_by_the_loader_mixin(tmp_path: Path) -> None:
    """A fit that never stops draws the same batches in the same order as without this package."""
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    class Watching(Toy):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen[adapted].append(batch[0].clone())
            return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    for adapted in seen:
        L.seed_everything(3, verbose=False)
        run = trainer(tmp_path, method=lora(dropout=0.0) if adapted else False, enable_checkpointing=False)
        run.fit(Watching(), loader(Noisy(), num_workers=1), val_loader())
    assert same(seen[True], seen[False])


class Preempted(Callback):
    """Sends SIGTERM to this process in the middle of a step, as a cluster does before it takes the machine away."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.skipif("save_on_exception" not in vars(ModelCheckpoint()), reason="needs a newer Lightning")
def test_sigterm_saves_and_the_run_resumes(tmp_path: Path) -> None:
    expected = fit(tmp_path / "a", loader, {})
    save = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True, save_on_exception=True)
    with pytest.raises(SystemExit):
        fit(tmp_path, loader, {}, save, Preempted())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4  # the step ends first
    assert same(fit(tmp_path / "b", loader, {}, ckpt=tmp_path / "last.ckpt"), expected)
