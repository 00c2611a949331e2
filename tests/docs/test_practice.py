"""docs/practice.md: every module trains, and its checkpoint holds what the page says."""

from __future__ import annotations

import runpy
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "practice"
OPTIONS = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def load(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def data():
    return DataLoader(TensorDataset(torch.randn(16, 16, generator=torch.Generator().manual_seed(1))), batch_size=4)


def fit(module, methods, epochs=1, **options):
    trainer = L.Trainer(max_epochs=epochs, callbacks=methods, **OPTIONS)
    trainer.fit(module, data(), **options)
    trainer.save_checkpoint("run.ckpt")
    return torch.load("run.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("name", "cls", "trained"),
    [
        ("two_towers", "TwoTowers", {"image.0", "text.0", "temperature"}),
        ("gan", "GAN", {"generator.0", "discriminator.0", "discriminator.2"}),
        ("freezing", "Frozen", {"net.0", "net.2"}),
    ],
)
def test_what_trains_is_in_the_checkpoint(name, cls, trained):
    example = load(name)
    module = example[cls]()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    state = fit(module, example["methods"])
    assert all(any(key.startswith(part) for key in state) for part in trained)
    frozen = start.keys() - state.keys()
    assert frozen
    assert all(torch.equal(module.state_dict()[key], start[key]) for key in frozen)
    assert not any(key.startswith("judge") for key in state)


def test_an_ema_teacher_has_adapters_and_resumes():
    make, method = load("ema_teacher")["SelfDistillation"], lambda: [lp.LoRA(r=4, trainable=["student.2"])]
    torch.manual_seed(0)
    module = make()
    start = {key: value.clone() for key, value in module.state_dict().items()}
    state = fit(module, method())
    assert "teacher.0.adapters.default.lora_B" in state
    again = make()
    again.load_state_dict(start)
    Path("run.ckpt").rename("one.ckpt")
    fit(again, method(), epochs=2, ckpt_path="one.ckpt")
    assert not torch.equal(again.teacher[0].adapters.default.lora_B, module.teacher[0].adapters.default.lora_B)


def test_compiling_once_the_adapters_are_in():
    state = fit(load("compiled")["Compiled"](backend="eager"), [lp.LoRA(r=4)])
    assert "net.0.adapters.default.lora_A" in state


def test_training_goes_on_from_an_adapter():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    lp.apply(base, lp.LoRA(r=4))
    lp.save_adapter(base, "adapter")
    torch.manual_seed(0)  # the same base
    module = load("continued")["Continued"]("adapter")
    before = {key: value.clone() for key, value in lp.adapter_state(module).items()}
    state = fit(module, [])
    assert state.keys() == before.keys()
    assert any(not torch.equal(value, before[key]) for key, value in state.items())


def test_folds_start_alike():
    torch.manual_seed(0)
    module = load("freezing")["Frozen"]()
    starts = []
    module.on_fit_start = lambda: starts.append({k: v.clone() for k, v in lp.adapter_state(module).items()})
    for _ in load("k_fold")["cross_validate"](module, [data(), data()], max_epochs=1, **OPTIONS):
        assert any(not torch.equal(value, starts[-1][key]) for key, value in lp.adapter_state(module).items())
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items())


def test_a_module_that_trims_its_checkpoint_is_refused_until_it_stops(monkeypatch):
    make = load("trimmed_before")["Trimmed"]
    with pytest.raises(lp.StateError, match="lora_A"):
        fit(make(), [lp.LoRA(r=4, trainable=["projector"])])
    monkeypatch.delattr(make, "on_save_checkpoint")
    state = fit(make(), [lp.LoRA(r=4, trainable=["projector"])])
    assert {"projector.weight", "projector.bias", "net.0.adapters.default.lora_A"} <= state.keys()
