"""The work of a comparison: pieces are done once, after a kill and by several processes; searches; failures."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft.compare.candidates import Candidate, Choices, Range, parse_candidates
from lightning_peft.compare.fractions import keep_batches, keep_fraction
from lightning_peft.compare.run import Metric
from lightning_peft.compare.search import open_storage, search
from lightning_peft.compare.store import Failure, Part, Result, Store
from lightning_peft.compare.study import Plan, Study
from lightning_peft.pretrained import InputError


def result(label: str, metric: float, seed: int = 0, fraction: float = 1.0, **values) -> Result:
    given = {"method": label, "trainable": 10, "total": 100, "step_ms": 1.0, "peak_mb": 1.0, "checkpoint_mb": 1.0}
    given |= {"forgetting_loss": None, "divergence": None, "minutes": 1.0, "values": {"lr": 1e-3}, "flags": []}
    return Result(
        **{**given, **values, "label": label, "metric": metric, "seed": seed, "fraction": fraction, "metrics": {}}
    )


class Trained:
    """A runner that trains nothing, and counts; the best learning rate of each method is 1e-2."""

    metric = Metric("val/loss", True, False, "val/loss", True)

    def __init__(self, stop_after: int | None = None) -> None:
        self.searches: list[float] = []
        self.finals: list[tuple[str, float, int]] = []
        self.parts: list[tuple[str, int, int]] = []
        self.continued: list[str] = []
        self.left = stop_after

    def _count(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1

    def search(self, candidate, values, steps, fraction, report=None):
        self._count()
        if candidate.method == "SSF":
            raise ValueError("does not fit\nthis model")
        self.searches.append(values["lr"])
        return abs(torch.tensor(values["lr"]).log10().item() + 2)

    def part(self, candidate, values, steps, fraction, seed, stop, state):
        self._count()
        self.parts.append((candidate.label, steps, stop))
        state.parent.mkdir(exist_ok=True)
        state.write_text(candidate.label)
        return Part(candidate.label, fraction, stop, len(candidate.label), 0.25, values)

    def final(self, candidate, values, steps, fraction, seed, state=None):
        self._count()
        if state is not None and state.exists():
            self.continued.append(state.read_text())
        self.finals.append((candidate.label, fraction, seed))
        time.sleep(0.01)
        return result(candidate.label, len(candidate.label) + 0.1 * seed, seed, fraction, values=values)


def study(folder: Path, runner: Trained, methods: str = "LoRA,IA3,BitFit,SSF", **changes) -> Study:
    candidates, _ = parse_candidates(methods, fixed_rank=True)
    plan = {"steps": 8, "search_steps": 2, "trials": 3, "seeds": range(2), "finalists": 2, "fractions": (0.1, 1.0)}
    return Study(Plan(candidates, **{**plan, **changes}), runner, Store(folder, {"steps": 8}))


def test_every_candidate_runs_the_best_run_again_and_a_failure_is_reported(tmp_path):
    runner = Trained()
    done = study(tmp_path, runner)
    done.run()
    for fraction in (0.1, 1.0):
        ran = sorted((label, seed) for label, f, seed in runner.finals if f == fraction)
        assert ran == [("BitFit", 0), ("IA3", 0), ("IA3", 1), ("LoRA", 0), ("LoRA", 1)]  # the shortest names are best
    assert len(done.results()) == 10
    assert {f.label: f.reason for f in done.failures()} == {"SSF": "ValueError: does not fit"}
    assert all(r.values["lr"] == pytest.approx(1e-2, rel=0.06) for r in done.results() if r.label == "LoRA")


def test_halving_trains_the_better_half_for_a_quarter_and_continues_with_the_best(tmp_path):
    whole, killed, rest = Trained(), Trained(stop_after=9), Trained()
    methods = "LoRA,IA3,BitFit,NormTuning,LinearProbe,SSF"
    settings = {"halving": True, "fractions": (1.0,), "trials": 1}
    done = study(tmp_path / "whole", whole, methods, **settings)
    done.run()
    # One trial each at the usual rates, 3e-3, 3e-2, 3e-3, 1e-2 and 3e-2: the search of the fake prefers 1e-2.
    assert whole.parts == [(label, 8, 2) for label in ("NormTuning", "IA3", "LinearProbe")]
    assert sorted(whole.finals) == [(label, 1.0, seed) for label in ("IA3", "NormTuning") for seed in (0, 1)]
    assert sorted(whole.continued) == ["IA3", "NormTuning"]
    assert [part.label for part in done.parts()] == ["LinearProbe"]
    assert not list((tmp_path / "whole" / "states").iterdir())
    assert done.minutes() == pytest.approx(4 * 1.0 + 0.25, abs=0.2)
    assert [failure.label for failure in done.failures()] == ["SSF"]
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "part", killed, methods, **settings).run()
    study(tmp_path / "part", rest, methods, **settings).run()
    assert sorted(killed.finals + rest.finals) == sorted(whole.finals)
    assert sorted(killed.continued + rest.continued) == sorted(whole.continued)


def test_a_killed_comparison_goes_on(tmp_path):
    whole, killed, rest = Trained(), Trained(stop_after=8), Trained()
    study(tmp_path / "whole", whole).run()
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "part", killed).run()
    done = study(tmp_path / "part", rest)
    done.run()
    assert sorted(killed.finals + rest.finals) == sorted(whole.finals)
    assert sorted(killed.searches + rest.searches) == pytest.approx(sorted(whole.searches))
    assert len(done.results()) == 10
    study(tmp_path / "part", Trained(stop_after=0)).run()  # nothing is left


def test_processes_share_the_work(tmp_path):
    runners = [Trained(), Trained(), Trained()]
    threads = [threading.Thread(target=study(tmp_path, r, trials=0).run, kwargs={"wait": 0.01}) for r in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finals = [final for runner in runners for final in runner.finals]
    assert len(finals) == len(set(finals)) == 2 * (4 + 2)
    assert sum(bool(runner.finals) for runner in runners) > 1


def test_failures_can_be_tried_again_and_other_settings_are_refused(tmp_path):
    done = study(tmp_path, Trained(), "SSF", fractions=(1.0,))
    done.run()
    assert isinstance(done.failures()[0], Failure)
    done.store.forget_failures()
    assert not done.failures()
    with pytest.raises(InputError, match="another value of steps"):
        Store(tmp_path, {"steps": 9})


def test_a_search_walks_to_the_best_rate_then_tries_other_arguments(tmp_path):
    tried: list[dict] = []

    def objective(values, report):
        tried.append(values)
        return abs(torch.tensor(values["lr"]).log10().item() + 1) - 0.1 * (values["r"] == 16) + len(values["targets"])

    ranges = {"r": Choices((4, 8, 16)), "targets": Choices((["q"], ["q", "v"])), "dropout": Range(0.0, 0.5)}
    candidate = Candidate("LoRA", "LoRA", ranges=ranges)
    storage = open_storage(tmp_path / "optuna.log")
    values, best = search(candidate, "a", storage, 12, True, objective)
    assert best == min(objective(t, None) for t in [*tried])
    del tried[12:]
    assert [t["lr"] for t in tried[:4]] == pytest.approx([3e-3, 9.49e-3, 3e-2, 9.49e-2], rel=1e-2)
    assert [(t["r"], len(t["targets"])) for t in tried[5:8]] == [(4, 2), (16, 2), (16, 1)]
    assert values["lr"] == pytest.approx(0.1, rel=0.6)
    assert (values["r"], values["targets"]) == (16, ["q"])
    assert len(tried) == 12
    assert search(candidate, "a", storage, 12, True, objective) == (values, best)
    assert len(tried) == 12


def test_bad_trials_are_stopped_and_a_rate_that_diverges_is_left(tmp_path):
    stopped: list[float] = []

    def objective(values, report):
        loss = float("nan") if values["lr"] > 2e-3 else -torch.tensor(values["lr"]).log10().item()
        try:
            report(1, loss)
            report(2, loss)
        except Exception:
            stopped.append(values["lr"])
            raise
        return loss

    values, _ = search(Candidate("LoRA", "LoRA"), "a", open_storage(tmp_path / "optuna.log"), 6, True, objective)
    assert values["lr"] < 2e-3
    assert stopped


def test_methods_of_a_file(tmp_path):
    file = tmp_path / "methods.yaml"
    file.write_text(
        "common: {trainable: [head]}\nmethods:\n  small: {method: lora, r: 2, lr: 1e-3}\n"
        "  LoRA: {r: {choices: [4, 8]}, lr: {low: 1e-4, high: 1e-2}, rank_pattern: {q: 2}}\n  IA3:\n"
    )
    (small, lora, ia3), named = parse_candidates(str(file))
    assert named
    assert (small.method, small.rate, small.searched) == ("LoRA", 1e-3, False)
    assert small.arguments == {"trainable": ["head"], "r": 2}
    assert (lora.ranges, lora.rate) == ({"r": Choices((4, 8))}, Range(1e-4, 1e-2, True))
    assert lora.arguments["rank_pattern"] == {"q": 2}
    assert lora.flags({"lr": 1e-3, "r": 8})[-1] == "--method.r=8"
    assert ia3.method == "IA3"
    assert len({c.key for c in (small, lora, ia3)}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {LoRA: {rank: 2}}", "does not have an argument 'rank'"),
        ("methods: {PrefixTunin: {}}", "did you mean 'PrefixTuning'"),
        ("methods: {LoRA: {lr: {low: 1, high: 1}}}", "is empty"),
        ("LoRA: {}", "needs a mapping 'methods'"),
    ],
)
def test_a_file_with_a_mistake(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        parse_candidates(str(tmp_path / "m.yaml"))


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(100)), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(100)), batch_size=4)


def examples(fraction: float) -> set[int]:
    data = Data()
    keep_fraction(data, fraction)
    return {int(x) for (batch,) in data.train_dataloader() for x in batch}


def test_fractions_are_fixed_and_contain_one_another():
    assert examples(0.2) == examples(0.2)
    assert examples(0.01) < examples(0.2) < examples(1)
    assert [len(examples(f)) for f in (0.01, 0.2, 1)] == [4, 20, 100]  # at least one batch


def test_runs_are_ranked_on_examples_from_all_of_the_validation_data():
    data = Data()
    keep_batches(data, 5)
    kept = [int(x) for (batch,) in data.val_dataloader() for x in batch]
    assert len(kept) == 20
    assert max(kept) > 60, "a file that is sorted by label does not show one label only"
    assert kept == [int(x) for (batch,) in data.val_dataloader() for x in batch]
    keep_batches(data, 50)
    assert len(data.val_dataloader().dataset) == 20
