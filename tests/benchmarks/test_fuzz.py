"""A short run of the fuzzer: mutated files load with equal numbers, or are refused by an error that names the file."""

import pytest

from benchmarks.fuzz import GOOD, KINDS, Subject, outcome


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject(tmp_path_factory.mktemp("fuzz").resolve())


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(subject, kind):
    outcomes = {seed: outcome(subject, kind, seed) for seed in range(20)}
    assert {seed: what for seed, what in outcomes.items() if what not in GOOD} == {}
    assert "refused" in outcomes.values()
