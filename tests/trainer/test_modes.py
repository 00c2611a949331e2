"""During a fit, everything that trains is in training mode, and every other module keeps its mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp

from .toys import Toy, loader, trainer, val_loader


class Pretrained(Toy):
    """Its body and head are in eval mode, as after ``from_pretrained``; it records the modes in each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 2))
        self.body.eval()
        self.head.eval()
        self.seen: list[dict[str, bool]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append({name: module.training for name, module in self.named_modules()})
        return super().training_step(batch, batch_idx)


class EvalAgain(Pretrained):
    def on_train_epoch_start(self) -> None:
        self.body.eval()


def fit(root: Path, module: Toy, *methods: Any, **options: Any) -> None:
    run = trainer(root, method=methods[0], enable_checkpointing=False, max_epochs=2, **options)
    run.callbacks.extend(methods[1:])
    run.fit(module, loader(), val_loader())


@pytest.mark.parametrize("kind", [Pretrained, EvalAgain])
def test_adapters_and_heads_train_while_their_host_stays_in_eval_mode(kind: type[Pretrained], tmp_path: Path) -> None:
    module = kind()
    method = lp.LoRA(r=2, targets=["body.0", "body.4"], trainable=["head"])
    fit(tmp_path, module, method)
    for modes in module.seen:
        assert modes["body.0.adapters.default"]
        assert modes["body.4.adapters.default"]
        assert modes["head"]
        assert modes["head.0"]
        assert not any(modes[name] for name in ("body", "body.0", "body.1", "body.3"))
    assert not any(m.training for m in [*module.body.modules(), *module.head.modules()])  # as the user set them
    x = torch.randn(4, 16)
    assert torch.equal(module(x), module(x))


def test_modes_come_back_after_an_exception(tmp_path: Path) -> None:
    class Fails(Pretrained):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.head.training
            raise KeyError("mine")

    module = Fails()
    with pytest.raises(KeyError, match="mine"):
        fit(tmp_path, module, lp.LoRA(r=2, targets=["body.0"], trainable=["head"]))
    assert not any(m.training for m in [*module.body.modules(), *module.head.modules()])


def test_dylora_draws_ranks_in_a_base_in_eval_mode(tmp_path: Path) -> None:
    class Ranks(Pretrained):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(int((self.body[4].adapters["default"].factors()[0] != 0).any(-1).sum()))
            return Toy.training_step(self, batch, batch_idx)

    module = Ranks()
    fit(tmp_path, module, lp.DyLoRA(r=4, targets=["body.4"], trainable=["head"]))
    assert len(set(module.seen)) > 1  # type: ignore[arg-type]


def test_a_frozen_adapter_follows_its_host(tmp_path: Path) -> None:
    module = Pretrained()
    lp.apply(module, lp.LoRA(r=2, targets=["body.0"], name="old"))
    lp.save_adapter(module, tmp_path / "old", "old")
    module = Pretrained()
    lp.load_adapter(module, tmp_path / "old", "old")
    fit(tmp_path, module, lp.LoRA(r=2, targets=["body.4"], trainable=["head"], name="new"))
    assert not any(modes["body.0.adapters.old"] for modes in module.seen)
    assert all(modes["body.4.adapters.new"] for modes in module.seen)


def test_the_report_names_a_base_in_eval_mode(tmp_path: Path) -> None:
    module = Pretrained()
    method = lp.LoRA(r=2, targets=["body.0"], trainable=["head"])
    fit(tmp_path, module, method)
    record = module.__dict__["_peft_injection"]
    assert record.report.in_eval_mode == ["body"]
    assert "frozen base stays in eval mode, without its own dropout: body" in record.report.__rich__().caption
    module.train()
    fit(tmp_path, module, method)
    assert record.report.in_eval_mode == []
    assert "eval mode" not in (record.report.__rich__().caption or "")
    assert module.body[0].adapters["default"].training
