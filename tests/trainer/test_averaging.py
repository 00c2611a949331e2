"""Weight averaging callbacks, listed before or after the method, average the trainable state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_peft as lp

from .toys import Toy, every_step, loader, lora, same, state_of, trainer, val_loader


def run_with(root: Path, callbacks: list[Any], where: str = "init", ckpt: Any = None, **options: Any) -> Any:
    L.seed_everything(1 if ckpt is None else 9, verbose=False)
    module = Toy(where)
    run = trainer(root, *callbacks, method=False, **options)
    run.fit(module, loader(), val_loader(), ckpt_path=ckpt)
    return module, run


def by_hand(root: Path, decay: float) -> dict[str, torch.Tensor]:
    """A callback that computes the average of the trainable parameters independently."""
    average: dict[str, torch.Tensor] = {}

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            for name, p in module.named_parameters():
                if p.requires_grad:
                    before = average.get(name)  # torch's average starts with the first values it gets
                    average[name] = p.detach().clone() if before is None else before.lerp(p.detach(), 1 - decay)

    run_with(root, [lora(), Record()], enable_checkpointing=False)
    return average


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("first", [True, False])
def test_average_is_right_in_any_order_and_the_base_stays(tmp_path: Path, first: bool, where: str) -> None:
    expected = by_hand(tmp_path, 0.8)
    ema = EMAWeightAveraging(decay=0.8)
    callbacks = [ema, lora()] if first else [lora(), ema]
    module, _ = run_with(tmp_path, [*callbacks, ModelCheckpoint(tmp_path)], where)
    base = Toy().state_dict()
    state = module.state_dict()
    assert all(torch.equal(v, base[k]) for k, v in state.items() if "adapters" not in k and "head" not in k)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_are_trimmed_and_resume(tmp_path: Path, first: bool) -> None:
    def callbacks() -> list[Any]:
        both = [EMAWeightAveraging(decay=0.8), lora()]
        return both if first else both[::-1]

    module, run = run_with(tmp_path, [*callbacks(), *every_step(tmp_path)], "configure_model")
    expected = state_of(module, run)
    path = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert len(checkpoint[part]) == 6
        assert all("adapters" in k or "head" in k for k in checkpoint[part])
    assert not same(checkpoint["state_dict"], checkpoint["current_model_state"])
    for name in ("step=3.ckpt", "end-epoch=0.ckpt"):
        again, r = run_with(tmp_path, callbacks(), "configure_model", ckpt=tmp_path / name, enable_checkpointing=False)
        assert same(state_of(again, r), expected), name
    loaded = lp.load_from_checkpoint(Toy, path)  # the checkpoint's weights are the average
    assert torch.equal(loaded.head.weight, checkpoint["state_dict"]["head.weight"])
    trainer(tmp_path).test(Toy(), val_loader(), ckpt_path=path, verbose=False)


def test_validation_sees_the_average(tmp_path: Path) -> None:
    module, run = run_with(tmp_path, [lora(), EMAWeightAveraging(decay=0.8)])
    seen = float(run.callback_metrics["val_loss"])
    run.validate(module, val_loader(), verbose=False)  # after the fit, the model has the averaged weights
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(seen)


def test_moving_norm_statistics_are_averaged_too(tmp_path: Path) -> None:
    module, _ = run_with(tmp_path, [lora(train_norm_stats=True), WeightAveraging()])
    plain, _ = run_with(tmp_path, [lora(train_norm_stats=True)])
    assert module.body[1].running_mean.abs().sum() > 0
    assert not torch.equal(module.body[1].running_mean, plain.body[1].running_mean)


def test_checkpoint_without_an_average(tmp_path: Path) -> None:
    run_with(tmp_path, [lora(), *every_step(tmp_path)])
    run_with(tmp_path, [lora(), EMAWeightAveraging(decay=0.8)], ckpt=tmp_path / "step=3.ckpt")


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_is_a_clear_error(tmp_path: Path, first: bool) -> None:
    both = [StochasticWeightAveraging(0.1), lora()]
    with pytest.raises(MisconfigurationException, match=r"Use lightning\.pytorch\.callbacks\.WeightAveraging"):
        run_with(tmp_path, both if first else both[::-1])
