"""Hyperparameters of any type: the state loads, and the module is rebuilt or an error asks for the missing ones."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_peft as lp
from tests.trainer.toys import Toy, loader, same, trainer


class Loss:
    """A user-defined object, such as a metric or a category encoder."""

    def __init__(self, weight: float) -> None:
        self.weight = weight


class WithObject(Toy):
    def __init__(self, loss: Any = None, width: int = 16) -> None:
        super().__init__(width=width)
        self.save_hyperparameters()
        self.scale = loss.weight if loss else 1.0


class OneArgument(Toy):
    def __init__(self, args: Any = None) -> None:
        super().__init__()
        self.hparams.pop("args")  # Toy.__init__ has saved it too
        args = args if args is not None else {"scale": 1.0}
        self.save_hyperparameters(args)
        self.scale = args["scale"] if isinstance(args, dict) else args.scale


class OneRequired(OneArgument):
    def __init__(self, args: Any) -> None:
        super().__init__(args)


class OneNamespace(OneArgument):
    def __init__(self, args: Namespace) -> None:
        assert isinstance(args, Namespace)
        super().__init__(args)


def fitted(module: Any, path: Path) -> Any:
    run = trainer(path.parent, max_epochs=1, limit_train_batches=1)
    run.fit(module, loader())
    run.save_checkpoint(path)
    return module


def test_an_object_is_stored_separately_and_must_be_passed(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.warns(UserWarning, match=r"'loss' is a Loss.*Unsupported global.*checkpoints store it separately"):
        module = fitted(WithObject(Loss(3.0), width=32), path)
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["width"] == 32
    with pytest.raises(lp.StateError, match=r"'loss' are objects.*loss=\.\.\..*weights_only=False"):
        lp.load_from_checkpoint(WithObject, path)  # although it has a default
    given = lp.load_from_checkpoint(WithObject, path, loss=Loss(2.0))
    read = lp.load_from_checkpoint(WithObject, path, weights_only=False)
    assert (given.scale, read.scale) == (2.0, 3.0)
    assert same(dict(given.state_dict()), dict(module.state_dict()))
    again = trainer(tmp_path, max_epochs=2, limit_train_batches=1)
    again.fit(WithObject(Loss(3.0), width=32), loader(), ckpt_path=path)
    assert again.global_step == 2


def test_a_file_with_an_unsafe_object_reports_the_reason_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    fitted(WithObject(), path)
    stored = torch.load(path, weights_only=True)
    stored["hyper_parameters"]["loss"] = Loss(3.0)  # as an earlier release wrote it
    torch.save(stored, path)
    with pytest.raises(lp.StateError, match=r"Unsupported global: GLOBAL .*Loss was not an allowed global"):
        lp.load_from_checkpoint(WithObject, path)
    assert lp.load_from_checkpoint(WithObject, path, weights_only=False).scale == 3.0


@pytest.mark.parametrize("cls", [OneArgument, OneRequired])
def test_one_argument_comes_back_as_one(tmp_path: Path, cls: type[Toy]) -> None:
    fitted(cls({"scale": 3.0}), tmp_path / "x.ckpt")
    assert lp.load_from_checkpoint(cls, tmp_path / "x.ckpt").scale == 3.0
    assert lp.load_from_checkpoint(cls, tmp_path / "x.ckpt", args={"scale": 4.0}).scale == 4.0


def test_a_namespace_comes_back_as_one(tmp_path: Path) -> None:
    fitted(OneNamespace(Namespace(scale=3.0)), tmp_path / "x.ckpt")
    assert lp.load_from_checkpoint(OneNamespace, tmp_path / "x.ckpt").scale == 3.0


def test_a_run_in_float64_loads_bit_for_bit(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, max_epochs=1, precision="64-true"), Toy()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "x.ckpt")
    back = lp.load_from_checkpoint(Toy, tmp_path / "x.ckpt")
    own = lp.adapter_state(module)
    assert same({k: v for k, v in back.state_dict().items() if k in own}, own)
