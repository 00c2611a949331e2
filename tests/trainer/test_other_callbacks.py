"""Every Lightning callback together with a method of each kind: it works as on a plain module, or is refused.

The plain module holds the same adapters and trains the same parameters, but its Trainer has no method among its
callbacks, so only Lightning's own code runs. ``test_averaging.py`` computes averages by hand, and
``test_saving_callbacks.py`` has the callbacks that save.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from tests.methods.tiny import Classifier
from tests.trainer.toys import same, trainer

METHODS: dict[str, Callable[[], lp.PEFTMethod]] = {
    "weight": lambda: lp.LoRA(r=2, trainable=["head"]),
    "selection": lambda: lp.BitFit(trainable=["head"]),
    "sequence": lambda: lp.PrefixTuning(3, trainable=["head"]),
}


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch size finder collects garbage in each trial, which takes seconds in a process with many objects."""
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


class Module(Classifier):
    """A small classifier with the attributes that tuners change."""

    def __init__(self, lr: float = 1e-2, batch_size: int = 8) -> None:
        super().__init__()
        self.body = self.body[:1]
        self.lr, self.batch_size = lr, batch_size

    @property
    def backbone(self) -> nn.Module:
        return self.body  # BackboneFinetuning expects this name

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(super().train_dataloader().dataset, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@dataclass
class Run:
    """A Trainer after a run, with its module and the callback under test."""

    module: Module
    trainer: L.Trainer
    callback: Any

    def state(self) -> dict[str, Any]:
        """The values that must equal those of a plain run."""
        record = {"weights": {k: v.clone() for k, v in self.module.state_dict().items()}}
        record |= {"optimizers": [o.state_dict()["state"] for o in self.trainer.optimizers]}
        return record | {"step": self.trainer.global_step, "epoch": self.trainer.current_epoch}


def start(folder: Path, method: str, callback: Any, how: str, **options: Any) -> Run:
    """A Trainer with the callback after the method ("last"), before it ("first"), or with no method ("plain")."""
    L.seed_everything(1, verbose=False)
    module, made = Module(), METHODS[method]()
    given = [callback] if callback is not None else []
    if how == "plain":
        lp.apply(module, made)
    else:
        given.insert(0 if how == "last" else 1, made)
    quick = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    return Run(module, trainer(folder, *given, method=False, **{**quick, **options}), callback)


def fit(run: Run) -> None:
    run.trainer.fit(run.module)


def predict(run: Run) -> None:
    fit(run)
    run.trainer.predict(run.module, return_predictions=False)


class Written(cb.BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[Tensor] = []

    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *args: Any) -> None:
        self.seen.append(prediction)


class Bar(cb.ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(self.get_metrics(trainer, pl_module))


class Calls(cb.LambdaCallback):
    """Records at which step each hook is called, with the loss."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        hooks = ("on_fit_start", "on_train_epoch_start", "on_train_batch_end", "on_before_optimizer_step", "on_fit_end")
        super().__init__(**{hook: functools.partial(self.record, hook) for hook in hooks})

    def record(self, hook: str, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append((hook, trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items()}))


class OwnState(cb.Callback):
    """A user's callback that has state."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}


def logged(run: Run) -> list[Any]:
    """The columns and values of the CSV log that do not depend on the clock."""
    clock = ("time", "per_sec", "cpu", "vm", "swap")
    rows = run.trainer.logger.experiment.metrics
    return [{k: v for k, v in row.items() if not any(word in k for word in clock)} for row in rows]


def columns(run: Run) -> set[str]:
    return {name for row in run.trainer.logger.experiment.metrics for name in row}


def averaged(run: Run) -> Any:
    """The trainable part of the average; a plain module's average has the frozen base too."""
    trained = {n.replace("/", ".") for n, p in run.module.named_parameters() if p.requires_grad}
    average = run.callback._average_model.module.state_dict()
    return {k.replace("/", "."): v for k, v in average.items() if k.replace("/", ".") in trained}


def summed(run: Run) -> Any:
    summary = run.callback._summary(run.trainer, run.module)
    return summary.trainable_parameters, summary.total_parameters, summary.layer_names


@dataclass
class Case:
    """One callback to test.

    Attributes:
        make: makes it.
        observe: returns its findings, which must equal those of the plain run.
        expect: checks the observed value.
        options: options of the Trainer; a logger is made where one is named.
        run: runs the Trainer.
    """

    make: Callable[[], Any]
    observe: Callable[[Run], Any] = lambda run: None
    expect: Callable[[Any], bool] = lambda found: True
    options: dict[str, Any] | None = None
    run: Callable[[Run], None] = fit


LOG = {"logger": True}

CASES: dict[str, Case] = {
    "BasePredictionWriter": Case(Written, lambda r: r.callback.seen, lambda s: len(s) == 3, run=predict),
    "BatchSizeFinder": Case(
        lambda: cb.BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=3),
        lambda r: (r.callback.optimal_batch_size, r.module.batch_size),
        lambda found: found[0] == found[1] > 3,
    ),
    "DeviceStatsMonitor": Case(
        lambda: cb.DeviceStatsMonitor(cpu_stats=True), columns, lambda names: len(names) > 4, LOG
    ),
    "EarlyStopping": Case(
        lambda: cb.EarlyStopping("val_loss", min_delta=9.0, patience=1),
        lambda r: (r.callback.stopped_epoch, r.callback.best_score),
        lambda found: found[0] == 1,
        {"max_epochs": 5},
    ),
    "EMAWeightAveraging": Case(lambda: cb.EMAWeightAveraging(decay=0.8), averaged, lambda found: len(found) >= 4),
    "GradientAccumulationScheduler": Case(
        lambda: cb.GradientAccumulationScheduler({0: 1, 1: 3}),
        lambda r: r.trainer.global_step,
        lambda steps: steps == 3 + 1,
    ),
    "LambdaCallback": Case(Calls, lambda r: r.callback.seen, lambda seen: len(seen) == 2 + 2 + 6 + 6),
    "LearningRateFinder": Case(
        lambda: cb.LearningRateFinder(num_training_steps=14, early_stop_threshold=None),
        lambda r: (r.callback.optimal_lr.results, r.callback.optimal_lr.suggestion(), r.module.lr),
        lambda found: found[1] == found[2] != 1e-2 and len(found[0]["lr"]) == 14,
        {"max_epochs": 5},
    ),
    "LearningRateMonitor": Case(cb.LearningRateMonitor, logged, lambda rows: any("lr-AdamW" in r for r in rows), LOG),
    "ModelSummary": Case(lambda: cb.ModelSummary(3), summed, lambda found: found[0] < found[1]),
    "ProgressBar": Case(Bar, lambda r: r.callback.seen, lambda s: len(s) == 6, {"enable_progress_bar": True}),
    "RichModelSummary": Case(lambda: cb.RichModelSummary(3), summed, lambda found: found[0] < found[1]),
    "RichProgressBar": Case(lambda: cb.RichProgressBar(refresh_rate=0), options={"enable_progress_bar": True}),
    "SpikeDetection": Case(lambda: cb.SpikeDetection(warmup=2), lambda r: r.callback.state_dict()["last_val"]),
    "ThroughputMonitor": Case(
        lambda: cb.ThroughputMonitor(lambda batch: len(batch[0]), window_size=2), columns, options=LOG
    ),
    "Timer": Case(
        lambda: cb.Timer(duration={"hours": 1}),
        lambda r: r.trainer.global_step,
        lambda steps: steps == 6,
    ),
    "TQDMProgressBar": Case(lambda: cb.TQDMProgressBar(refresh_rate=0), options={"enable_progress_bar": True}),
    "WeightAveraging": Case(cb.WeightAveraging, averaged, lambda found: len(found) >= 4),
    "a user's callback with state": Case(OwnState, lambda r: r.callback.count, lambda count: count == 6),
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "BackboneFinetuning": (lambda: cb.BackboneFinetuning(1), r"freezes modules before the adapters .*GradualUnf"),
    "BaseFinetuning": (lambda: type("Own", (cb.BaseFinetuning,), {"freeze_before_training": lambda *_: None})(), "Own"),
    "ModelPruning": (lambda: cb.ModelPruning("l1_unstructured"), "changes frozen weights .* before the fit"),
    "StochasticWeightAveraging": (lambda: cb.StochasticWeightAveraging(0.1), "copies the model before .*EMAWeightAv"),
}

#: base classes, and the callbacks of test_saving_callbacks.py
ELSEWHERE = {"Callback", "Checkpoint", "ModelCheckpoint", "OnExceptionCheckpoint"}


def test_every_callback_of_lightning_is_in_a_table() -> None:
    assert set(cb.__all__) <= {*CASES, *REFUSED, *ELSEWHERE}


@functools.cache
def plain(name: str, method: str, folder: Path) -> tuple[Any, Any]:
    run = done(name, method, folder, "plain")
    return CASES[name].observe(run), run.state()


def done(name: str, method: str, folder: Path, how: str) -> Run:
    case = CASES[name]
    options = dict(case.options or {})
    if "logger" in options:
        options["logger"] = CSVLogger(folder / how)
        options["logger"].experiment.save = lambda: None  # keeps the rows that it would write and forget
    run = start(folder, method, case.make(), how, **options)
    case.run(run)
    return run


def both(a: Any, b: Any) -> bool:
    return same(list(a), list(b)) if isinstance(a, tuple) else same(a, b)


ORDERS = [("weight", "first"), ("selection", "last"), ("sequence", "first")]


@pytest.mark.parametrize(("method", "how"), ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_does_what_it_does_to_a_plain_module(name: str, method: str, how: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "callbacks"
    expected, state = plain(name, method, folder)
    run = done(name, method, folder, how)
    found = CASES[name].observe(run)
    assert CASES[name].expect(found)
    assert both(found, expected)
    now = run.state()
    if "WeightAveraging" in name:  # averages of equal frozen values differ from these by rounding in the plain run
        base = Module().state_dict()
        for key, value in now["weights"].items():
            trained = key in averaged(run)
            assert torch.equal(value, state["weights"][key] if trained else base[key]), key
        del now["weights"]
    assert same(now, {key: state[key] for key in now})


@pytest.mark.parametrize("how", ["first", "last"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_at_the_start(name: str, method: str, how: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    run = start(tmp_path, method, make(), how)
    with pytest.raises(MisconfigurationException, match=f"is not supported with PEFT methods: .*{why}|{why}.*PEFT"):
        fit(run)
    assert not [name for name, m in run.module.named_modules() if isinstance(m, lp.Adapter)]


def tuned(run: Run) -> None:
    tuner = Tuner(run.trainer)
    tuner.lr_find(run.module, num_training=6, early_stop_threshold=None)
    tuner.scale_batch_size(run.module, max_trials=2, steps_per_trial=1)
    fit(run)


def fit_test_fit(run: Run) -> None:
    fit(run)
    run.trainer.test(run.module, verbose=False)
    run.trainer.fit_loop.max_epochs += 1
    fit(run)


def validated(run: Run) -> None:
    run.trainer.validate(run.module, verbose=False)
    fit(run)
    run.trainer.predict(run.module)


def two_trainers(run: Run) -> None:
    fit(run)
    methods = [c for c in run.trainer.callbacks if isinstance(c, lp.PEFTMethod)]
    run.trainer = trainer(run.trainer.default_root_dir, *methods, method=False, enable_checkpointing=False)
    fit(run)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("runs", [tuned, fit_test_fit, validated, two_trainers])
def test_several_runs_of_one_module(runs: Callable[[Run], None], method: str, tmp_path: Path) -> None:
    states = []
    for how in ("plain", "last"):
        run = start(tmp_path, method, None, how)
        runs(run)
        states.append({**run.state(), "lr": run.module.lr, "batch size": run.module.batch_size})
    assert same(*states)
