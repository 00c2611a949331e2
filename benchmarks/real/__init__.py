"""Methods compared on real data with real pretrained weights: see ``docs/results.md``."""

from __future__ import annotations

import importlib

from benchmarks.real.study import Study

STUDIES = ("e2e", "cifar", "banking77")


def load(name: str) -> Study:
    """Return a study by its name in ``STUDIES``."""
    study: Study = importlib.import_module(f"benchmarks.real.{name}").STUDY
    return study
