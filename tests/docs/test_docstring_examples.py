"""The Example blocks of public docstrings: their names and arguments exist, and those of classes run."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.methods.tiny import llama

CLASSES = [n for n in lp.__all__ if inspect.isclass(getattr(lp, n)) and not issubclass(getattr(lp, n), Exception)]


def example(name: str) -> str | None:
    """The code of the Example block in the docstring of ``lp.name`` itself, not of a base class."""
    _, found, code = inspect.cleandoc(getattr(lp, name).__doc__ or "").partition("Example::\n")
    return textwrap.dedent(code) if found else None


WITH_EXAMPLE = [name for name in lp.__all__ if example(name) is not None]


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_names_and_arguments_exist(name):
    for call in ast.walk(ast.parse(example(name) or "")):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            value = call.func.value
            if isinstance(value, ast.Name) and value.id == "lp":
                keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                inspect.signature(getattr(lp, call.func.attr)).bind(*call.args, **keywords)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_an_example_that_runs(name, monkeypatch):
    code = example(name)
    assert code is not None, f"lp.{name}: add an Example:: block to its docstring"
    # The examples use the reader's own module, so a fit is replaced; only the Trainer is created.
    monkeypatch.setattr(L.Trainer, "fit", lambda trainer, module: lp.apply(module, *trainer.callbacks[:1]))
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    monkeypatch.setattr(L, "Trainer", functools.partial(L.Trainer, accelerator="cpu", **options))
    model = llama()
    module = nn.ModuleDict({"body": model, "classifier": nn.Linear(8, 2)})
    names = {"L": L, "lp": lp, "nn": nn, "torch": torch, "model": model, "module": module}
    exec(compile(code, f"Example of lp.{name}", "exec"), names)
