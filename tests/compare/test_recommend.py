"""The rule by which a method is recommended, on results that are made up."""

from __future__ import annotations

import math

import pytest

from lightning_peft.compare.plots import pareto_front
from lightning_peft.compare.recommend import Budget, recommend, summarise
from tests.compare.test_study import result

#: accuracy of two seeds, trainable parameters, minutes
RESULTS = {
    "FullFineTuning": ((0.90, 0.92), 10_000, 10.0),
    "LoRA": ((0.90, 0.91), 1_000, 6.0),
    "IA3": ((0.885, 0.905), 50, 5.0),
    "BitFit": ((0.85, 0.86), 40, 5.0),
    "PromptTuning": ((0.60,), 10, 7.0),
}


def summaries(lower: bool = False, change=lambda metric: metric):
    results = [
        result(label, change(metric), seed, trainable=size, minutes=minutes)
        for label, (metrics, size, minutes) in RESULTS.items()
        for seed, metric in enumerate(metrics)
    ]
    return summarise(results, lower)


def test_summaries_pool_the_variance_between_seeds():
    found = summaries()
    assert [s.label for s in found] == ["FullFineTuning", "LoRA", "IA3", "BitFit", "PromptTuning"]
    pooled = (2e-4 + 5e-5 + 2e-4 + 5e-5) / 4  # each pair's variance is half its squared difference
    assert found[0].metric == pytest.approx(0.91)
    assert found[0].error == pytest.approx(math.sqrt(pooled / 2))
    assert found[-1].error == pytest.approx(math.sqrt(pooled))


def test_the_smallest_of_the_best_within_noise():
    found = recommend(summaries(), Budget(), lower=False)
    assert found.chosen.label == "IA3"
    assert {s.label for s in found.equal} == {"FullFineTuning", "LoRA", "IA3"}
    assert "equals the best, FullFineTuning" in found.reasons[0]
    assert "LoRA" in found.reasons[1]
    found = recommend(summaries(lower=True, change=lambda metric: 1 - metric), Budget(), lower=True)
    assert found.chosen.label == "IA3"


def test_budgets():
    assert recommend(summaries(), Budget(max_params=45), lower=False).chosen.label == "BitFit"
    found = recommend(summaries(), Budget(max_minutes=5.5, max_params=5_000), lower=False)
    assert found.chosen.label == "IA3"
    assert any("LoRA is over the budget: about 6 minutes" in reason for reason in found.reasons)
    # The full training is four times as long as the runs of the comparison.
    assert recommend(summaries(), Budget(max_minutes=5.5), lower=False, length=4).chosen is None


def test_keeping_a_part_of_full_fine_tuning():
    assert recommend(summaries(), Budget(keep=0.93), lower=False).chosen.label == "BitFit"
    assert recommend(summaries(), Budget(keep=0.97), lower=False).chosen.label == "IA3"
    found = recommend(summaries(), Budget(keep=0.99, max_params=100), lower=False)
    assert found.chosen is None
    assert "IA3 keeps 0.984" in found.reasons[0]
    # With a loss, the part of the improvement over the base: 0.5 to 0.09 at best, so BitFit keeps 0.355 / 0.41.
    loss = summaries(lower=True, change=lambda metric: 1 - metric)
    assert recommend(loss, Budget(keep=0.86), lower=True, base=0.5).chosen.label == "BitFit"
    assert recommend(loss, Budget(keep=0.87), lower=True, base=0.5).chosen.label == "IA3"
    assert "base could not be evaluated" in recommend(loss, Budget(keep=0.87), lower=True).reasons[-1]


def test_one_seed_says_that_the_noise_is_unknown():
    found = recommend(summarise([result("a", 0.9), result("b", 0.89)], lower=False), Budget(), lower=False)
    assert found.chosen.label == "a"
    assert any("noise is unknown" in reason for reason in found.reasons)


def test_nothing_ran():
    assert recommend([], Budget(), lower=False).chosen is None


def test_the_pareto_front():
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8), (4.0, 0.85)]
    assert pareto_front(points, lower=False) == [(1.0, 0.5), (3.0, 0.9)]
    assert pareto_front(points, lower=True) == [(1.0, 0.5), (2.0, 0.4)]
