"""Adapters are injected exactly once, wherever the module builds its layers and however often the Trainer runs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner

import lightning_peft as lp

from .toys import Toy, loader, lora, same, state_of, trainer, val_loader


def adapters(module: torch.nn.Module) -> list[str]:
    return [name for name, m in module.named_modules() if isinstance(m, lp.Adapter)]


def fitted(root: Path, where: str) -> tuple[Toy, L.Trainer]:
    L.seed_everything(1, verbose=False)
    module, run = Toy(where), trainer(root)
    run.fit(module, loader(), val_loader())
    return module, run


def test_same_adapters_and_weights_wherever_the_module_is_built(tmp_path: Path) -> None:
    states = {}
    for where in ("init", "setup", "configure_model", "apply"):
        module, run = fitted(tmp_path / where, where)
        assert len(adapters(module)) == 2
        states[where] = state_of(module, run)
        path = run.checkpoint_callback.best_model_path
        again = lp.load_from_checkpoint(Toy, path)
        x = torch.randn(4, 16)
        assert torch.equal(module.eval()(x), again.eval()(x))
    assert all(same(state, states["init"]) for state in states.values())


class WithData(Toy):
    def val_dataloader(self) -> Any:
        return val_loader()


def test_runs_after_runs_inject_once(tmp_path: Path) -> None:
    L.seed_everything(1, verbose=False)
    module, run = WithData("setup"), trainer(tmp_path, max_epochs=1)
    Tuner(run).lr_find(module, loader(), val_loader(), num_training=20)
    Tuner(run).scale_batch_size(module, mode="power", steps_per_trial=1, max_trials=2, init_val=4)
    run.fit(module, loader(), val_loader())
    assert len(adapters(module)) == 2
    trained = {k: v.clone() for k, v in module.state_dict().items()}
    run.validate(module, val_loader(), verbose=False)
    run.test(module, val_loader(), ckpt_path="best", verbose=False)
    run.predict(module, val_loader())
    assert same(dict(module.state_dict()), trained)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), val_loader())
    assert len(adapters(module)) == 2
    assert run.current_epoch == 2
    again = trainer(tmp_path, max_epochs=1, method=lora())  # a new Trainer, an equal method
    again.fit(module, loader(), val_loader())
    assert len(adapters(module)) == 2
    assert not same(dict(module.state_dict()), trained)


def test_another_configuration_on_an_adapted_module_is_an_error(tmp_path: Path) -> None:
    module, _ = fitted(tmp_path, "init")
    with pytest.raises(ValueError, match="r=4 there, 8 here"):
        trainer(tmp_path, method=lora(r=8)).fit(module, loader())


def test_several_callbacks(tmp_path: Path) -> None:
    first, second = lora(targets=["body.0"], name="a"), lora(targets="all-linear", name="b", trainable=[])
    module = Toy("setup")
    run = trainer(tmp_path, second, method=first)
    run.fit(module, loader(), val_loader())
    assert adapters(module) == ["body.0.adapters.a", "body.0.adapters.b", "body.4.adapters.b"]
    state = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert len(state["state_dict"]) == 8
    assert [m["config"]["name"] for m in state["lightning_peft"]["methods"]] == ["a", "b"]
    assert sum(isinstance(c, type(run.callbacks[1])) for c in run.callbacks) == 1
    again = lp.load_from_checkpoint(Toy, run.checkpoint_callback.best_model_path)
    assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_optimizer_that_lightning_cli_puts_on_the_instance(tmp_path: Path) -> None:
    module = Toy()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    base = module.body[0].weight.clone()
    run = trainer(tmp_path)
    run.fit(module, loader())
    assert isinstance(run.optimizers[0], torch.optim.SGD)
    assert torch.equal(module.body[0].weight, base)
    assert module.body[0].adapters["default"].lora_B.abs().sum() > 0


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_a_pattern_that_names_nothing_stops_the_run(tmp_path: Path, where: str) -> None:
    with pytest.raises(lp.TargetError, match=r"'hed' matches nothing; nearest: head"):
        trainer(tmp_path, method=lora(trainable=["hed"])).fit(Toy(where), loader())
    with pytest.raises(lp.TargetError, match="q_proj"):
        trainer(tmp_path, method=lora(targets=["q_proj"])).fit(Toy(where), loader())


def test_methods_and_adapted_modules_pickle(tmp_path: Path) -> None:
    method = pickle.loads(pickle.dumps(lora()))  # as spawn strategies do
    assert method.config() == lora().config()
    module, _ = fitted(tmp_path, "init")
    module.trainer = None
    again = pickle.loads(pickle.dumps(module))
    assert same(dict(again.state_dict()), dict(module.state_dict()))


def test_ddp_spawn_trains_and_warns_where_the_result_is(tmp_path: Path) -> None:
    module, run = Toy(), trainer(tmp_path, strategy="ddp_fork", devices=2, max_epochs=1)
    run.fit(module, loader(), val_loader())
    again = lp.load_from_checkpoint(Toy, run.checkpoint_callback.best_model_path)
    assert again.body[0].adapters["default"].lora_B.abs().sum() > 0


class NoOptimizer(Toy):
    def configure_optimizers(self) -> Any:
        return None


class FrozenOnly(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.body.parameters(), lr=0.1)


def test_optimizers_that_would_train_nothing(tmp_path: Path) -> None:
    with pytest.raises(L.pytorch.utilities.exceptions.MisconfigurationException, match="returned no optimizer"):
        trainer(tmp_path).fit(NoOptimizer(), loader())
    only_head = lora(targets=["head"], trainable=[])
    with pytest.raises(L.pytorch.utilities.exceptions.MisconfigurationException, match="frozen parameters only"):
        trainer(tmp_path, method=only_head).fit(FrozenOnly(), loader())
