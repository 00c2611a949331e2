"""The user's dataloaders are unchanged during and after a fit, and those that cannot resume cause a warning."""

from __future__ import annotations

import gc
import inspect
import pickle
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, TensorDataset

from lightning_peft.trainer.resume.dataloaders import TrainingLoaders
from tests.trainer.resume.test_resume import CASES, fit
from tests.trainer.toys import Noisy, Stream, Toy, data, every_step, loader, lora, same, state_of, trainer


class Watching(Toy):
    """Records the batches it gets, and raises at step ``fails_at``."""

    fails_at = -1

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, index: int) -> Any:
        if index == self.fails_at:
            raise RuntimeError("on purpose")
        self.seen.append(batch)
        return super().training_step(batch, index)


def run(train: Any, method: Any = None, module: Toy | None = None, **options: Any) -> Toy:
    L.seed_everything(3, verbose=False)
    module = module or Watching()
    defaults = {"enable_checkpointing": False, "max_epochs": 2}
    r = trainer("unused", method=method, **{**defaults, **options})
    r.fit(module, train)
    return module


def quiet() -> Any:
    return lora(dropout=0.0)


@pytest.mark.parametrize("fails_at", [-1, 1])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_nothing_is_left_on_a_loader(options: dict[str, Any], fails_at: int) -> None:
    mine, module = loader(**options), Watching()
    before, kind, module.fails_at = dict(vars(mine)), type(mine), fails_at
    L.seed_everything(3, verbose=False)
    r = trainer("unused", method=quiet(), enable_checkpointing=False, max_epochs=1)
    if fails_at < 0:
        r.fit(module, mine)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            r.fit(module, mine)
    assert type(mine) is kind
    assert vars(mine).keys() == before.keys()
    assert all(vars(mine)[k] is before[k] for k in before)
    assert r.train_dataloader is mine
    pickle.dumps(mine)
    assert sum(1 for _ in mine) == 5
    run(mine, method=False, module=Toy(), max_epochs=1)
    module.fails_at = -1
    r.validate(module, mine, verbose=False)
    assert len(r.predict(module, mine)) == 5


def test_a_loader_does_not_keep_trainer_and_module_alive() -> None:
    mine, module = loader(), Toy()
    r = trainer("unused", enable_checkpointing=False, max_epochs=1)
    r.fit(module, mine)
    gone = weakref.ref(r), weakref.ref(module)
    del r, module
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_combined_loader_of_the_user_has_its_loaders_back() -> None:
    parts = {"a": loader(), "b": loader(Noisy(16))}
    both = CombinedLoader(parts, "max_size_cycle")
    run(both, module=Toy())
    assert both.flattened[0] is parts["a"]
    assert both.iterables["b"] is parts["b"]
    run(both, module=Toy())


def test_hooks_see_the_loader_during_a_fit() -> None:
    class Asking(Toy):
        def on_train_batch_start(self, batch: Any, index: int) -> None:
            mine: Any = self.trainer.train_dataloader
            assert isinstance(mine, DataLoader)
            assert (len(mine), mine.batch_size, len(mine.dataset)) == (5, 8, 40)
            assert pickle.loads(pickle.dumps(mine)).batch_size == 8
            mine.note = index

    mine: Any = loader()
    run(mine, module=Asking())
    assert mine.note == 4


# The adapters draw no random numbers here, so a run with them must see the same batches as one without.
@pytest.mark.parametrize("case", [c for c in CASES if c not in {"accumulation", "clipping", "counted in steps"}])
def test_batches_equal_those_of_a_run_without_methods(case: str) -> None:
    train, options = CASES[case]
    seen = [run(train(), method, **options).seen for method in (quiet(), False)]  # type: ignore[attr-defined]
    assert len(seen[0]) > 4
    assert same(*seen)


class Drawing(Toy):
    def on_train_start(self) -> None:
        torch.rand(3)

    def on_train_epoch_start(self) -> None:
        random.random()
        torch.rand(2)


def test_random_draws_of_hooks_keep_their_order() -> None:
    class Both(Drawing, Watching):
        pass

    seen = [run({"a": loader(), "b": loader(Noisy(16))}, method, module=Both()).seen for method in (quiet(), False)]
    assert same(*seen)


class Prefetch(DataLoader):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield [t + 1 for t in batch]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_overrides_the_iteration_is_not_wrapped(tmp_path: Path, workers: int) -> None:
    def train() -> DataLoader:
        x, _ = data(16)
        return Prefetch(TensorDataset(x, x), batch_size=4, num_workers=workers)

    class Views(Watching):
        def loss(self, batch: Any) -> Any:
            first, second = batch
            return (self(first) - self(second).detach()).pow(2).mean() + self(first).mean()

    with pytest.warns(UserWarning, match="Prefetch overrides the iteration of DataLoader"):
        seen = run(train(), quiet(), module=Views()).seen  # type: ignore[attr-defined]
    assert same(seen, run(train(), False, module=Views()).seen)  # type: ignore[attr-defined]
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, saved).fit(Views(), train())
    trainer(tmp_path, enable_checkpointing=False).fit(Views(), train(), ckpt_path=tmp_path / "step=2.ckpt")


class Counted(DataLoader):
    """Resumes by itself."""

    done = 0

    def __iter__(self) -> Any:
        start, self.done = self.done, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= start:
                self.done = (i + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def test_a_stateful_loader_resumes_by_itself(tmp_path: Path) -> None:
    def train() -> Counted:
        return Counted(TensorDataset(*data()), batch_size=8)

    def seen(*callbacks: Any, ckpt: Path | None = None) -> list[Any]:
        module = Watching()
        trainer(tmp_path, *callbacks, enable_checkpointing=ckpt is None).fit(module, train(), ckpt_path=ckpt)
        return module.seen

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*will not see the same batches")
        expected = seen(*every_step(tmp_path))
    assert same(seen(ckpt=tmp_path / "step=2.ckpt"), expected[2:])


def test_torchdata_resumes_by_itself(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def train() -> Any:
        return stateful(TensorDataset(*data()), batch_size=8, shuffle=True)

    expected = fit(tmp_path, train, {}, *every_step(tmp_path))
    assert same(fit(tmp_path, train, {}, ckpt=tmp_path / "step=2.ckpt"), expected)


class Ordered(Sampler):
    """Draws each index from the sampler's own generator."""

    def __init__(self, generator: Any, size: int = 40) -> None:
        self.generator, self.size = generator, size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        for _ in range(self.size):
            if isinstance(self.generator, np.random.Generator):
                yield int(self.generator.integers(self.size))
            else:
                yield (
                    self.generator.randrange(self.size)
                    if hasattr(self.generator, "randrange")
                    else int(self.generator.randint(self.size))
                )


class Augmenting(Dataset):
    """Augments with the dataset's own generator."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self.x, self.y = data()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + float(self.rng.normal()), self.y[i]


class Passes(Sampler):
    """Draws one index at a time from the global RNGs."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Any:
        for _ in range(40):
            yield int(torch.randint(20, ())) + random.randrange(20)


def replaced(**options: Any) -> DataLoader:
    sampler = RandomSampler(range(40), replacement=True, generator=torch.Generator().manual_seed(2))
    return loader(sampler=sampler, **options)


GENERATORS: dict[str, Callable[..., DataLoader]] = {
    "numpy": lambda **o: loader(sampler=Ordered(np.random.default_rng(1)), **o),
    "numpy, another bit generator": lambda **o: loader(sampler=Ordered(np.random.Generator(np.random.MT19937(1))), **o),
    "numpy, RandomState": lambda **o: loader(sampler=Ordered(np.random.RandomState(1)), **o),
    "python": lambda **o: loader(sampler=Ordered(random.Random(1)), **o),
    "torch, with replacement": replaced,
    "global streams": lambda **o: loader(sampler=Passes(), **o),
    "dataset": lambda **o: loader(Augmenting(), **o),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", GENERATORS)
def test_generators_of_samplers_and_datasets_are_restored(tmp_path: Path, case: str, workers: int) -> None:
    def train() -> DataLoader:
        return GENERATORS[case](num_workers=workers)

    expected = fit(tmp_path, train, {}, *every_step(tmp_path))
    for stop in ("step=3", "end-epoch=0", "step=8"):
        assert same(fit(tmp_path, train, {}, ckpt=tmp_path / f"{stop}.ckpt"), expected), stop


def test_persistent_workers_in_epochs_after_a_resume_inside_an_epoch(tmp_path: Path) -> None:
    def train() -> DataLoader:
        return loader(Noisy(), num_workers=2, persistent_workers=True)

    expected = fit(tmp_path, train, {"max_epochs": 3}, *every_step(tmp_path))
    for stop in ("step=1", "step=3", "end-epoch=0", "step=6", "step=8"):
        assert same(fit(tmp_path, train, {"max_epochs": 3}, ckpt=tmp_path / f"{stop}.ckpt"), expected), stop


def test_an_iterator_in_a_sampler_causes_a_warning() -> None:
    class Endless(Sampler):
        def __init__(self) -> None:
            self.source = iter(range(1000))

        def __len__(self) -> int:
            return 16

        def __iter__(self) -> Any:
            return (next(self.source) % 40 for _ in range(16))

    with pytest.warns(UserWarning, match=r"Endless\.source is an iterator"):
        run(loader(sampler=Endless()), module=Toy())


@pytest.mark.parametrize("dataset", [None, Stream()])
def test_a_hook_that_iterates_the_loader_does_not_move_the_position(tmp_path: Path, dataset: Any) -> None:
    class Bank(Toy):
        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            if index % 2 == 0:
                self.bank = [x for x, _ in self.trainer.train_dataloader]

    def go(ckpt: Path | None = None) -> Any:
        L.seed_everything(3 if ckpt is None else 99, verbose=False)
        module, r = Bank(), trainer(tmp_path, *([] if ckpt else every_step(tmp_path)), enable_checkpointing=not ckpt)
        r.fit(module, loader(dataset), ckpt_path=ckpt)
        return state_of(module, r)

    expected = go()
    for stop in ("step=2", "step=4", "step=7"):  # the checkpoint of step 3 is saved before the hook runs
        assert same(go(tmp_path / f"{stop}.ckpt"), expected), stop


@pytest.mark.parametrize("train", [loader, lambda: loader(Stream()), lambda: {"a": loader(), "b": loader(Noisy(16))}])
def test_a_checkpoint_saved_after_a_fit_that_stopped_inside_an_epoch(tmp_path: Path, train: Any) -> None:
    def go(steps: int, ckpt: Path | None = None) -> tuple[Toy, L.Trainer]:
        L.seed_everything(3 if ckpt is None else 99, verbose=False)
        module, r = Toy(), trainer(tmp_path, max_steps=steps, max_epochs=-1, enable_checkpointing=False)
        r.fit(module, train(), ckpt_path=ckpt)
        return module, r

    go(3)[1].save_checkpoint(path := tmp_path / "later.ckpt")
    assert same(state_of(*go(8, path)), state_of(*go(8)))


def test_a_checkpoint_of_an_earlier_version_continues(tmp_path: Path) -> None:
    for workers in (0, 1):
        root = tmp_path / str(workers)

        def train(workers: int = workers) -> DataLoader:
            return loader(Noisy(), num_workers=workers)

        expected = fit(root, train, {}, *every_step(root))
        path = root / "step=3.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        for state in checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]:
            (record,) = state["pass"]
            known = {"start", "given", "first", "generators"}
            workers_then = {} if not workers else {0: record["reported"][2]}
            state["pass"] = [{**{k: record[k] for k in known}, "workers": workers_then}]
        torch.save(checkpoint, path)
        assert same(fit(root, train, {}, ckpt=path), expected)


def test_batches_out_of_order_cause_a_warning() -> None:
    if "in_order" not in inspect.signature(DataLoader).parameters:
        pytest.skip("torch before 2.6")
    loader: Any = DataLoader(data(), num_workers=2, in_order=False)
    with pytest.warns(UserWarning, match="in_order=False, batches arrive in the order in which workers finish"):
        TrainingLoaders().wrap(loader, L.Trainer(accelerator="cpu", logger=False))
