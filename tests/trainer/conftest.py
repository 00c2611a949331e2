"""Silence Lightning's tips and tables, which would hide failures among a hundred small fits."""

from __future__ import annotations

import logging

import pytest

pytest.register_assert_rewrite("tests.trainer.toys")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    monkeypatch.setattr("rich.console.Console.print", lambda *args, **kwargs: None)
