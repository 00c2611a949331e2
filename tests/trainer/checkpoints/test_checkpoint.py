"""The content of checkpoints, which of them load, and which are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_peft as lp
from tests.trainer.toys import Toy, loader, lora, same, trainer, val_loader


def trained(root: Path, module: Toy | None = None, method: Any = None, **options: Any) -> Path:
    save = ModelCheckpoint(root, filename="good", **options)
    trainer(root, save, method=method, max_epochs=1).fit(module or Toy(), loader(), val_loader())
    return root / "good.ckpt"


@pytest.mark.parametrize("weights_only", [False, True])
def test_holds_the_trainable_state_only(tmp_path: Path, weights_only: bool) -> None:
    path = trained(tmp_path, Toy(width=1024), save_weights_only=weights_only)
    state = torch.load(path, weights_only=True)
    size = sum(t.numel() * t.element_size() for t in state["state_dict"].values())
    assert path.stat().st_size <= 4 * size + 1_000_000
    assert sum(p.numel() * 4 for p in Toy(width=1024).parameters()) > 4_000_000
    assert set(state["state_dict"]) == {
        *(f"body.{i}.adapters.default.lora_{x}" for i in (0, 4) for x in "AB"),
        "head.weight",
        "head.bias",
    }


def edited(path: Path, change: Any) -> Path:
    state = torch.load(path, weights_only=True)
    change(state)
    state.get("lightning_peft", {}).pop(
        "digests", None
    )  # as earlier releases wrote them; otherwise the digests fail before the check under test
    torch.save(state, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


def truncate(state: Any) -> None:
    del state["state_dict"]["body.0.adapters.default.lora_A"]


def rename(state: Any) -> None:
    state["state_dict"]["body.0.adapters.default.lora_X"] = state["state_dict"].pop("body.0.adapters.default.lora_A")


def misshape(state: Any) -> None:
    state["state_dict"]["body.0.adapters.default.lora_A"] = torch.zeros(3, 16)


def foreign(state: Any) -> None:
    del state["lightning_peft"]
    state["state_dict"] = {"encoder.weight": torch.zeros(2)}


def no_number(state: Any) -> None:
    state["state_dict"]["head.bias"][0] = float("nan")


BROKEN = {truncate: "missing: body.0.adapters.default.lora_A", rename: "lora_X", misshape: r"lora_A: \(3, 16\)"}
BROKEN |= {foreign: "lightning_peft", no_number: "head.bias: holds NaN"}


@pytest.mark.parametrize("change", BROKEN)
def test_broken_checkpoints_name_the_key(tmp_path: Path, change: Any) -> None:
    path = edited(trained(tmp_path), change)
    with pytest.raises(lp.StateError, match=BROKEN[change]):
        trainer(tmp_path).fit(Toy(), loader(), ckpt_path=path)
    with pytest.raises(lp.StateError, match=BROKEN[change]):
        trainer(tmp_path).test(Toy(), val_loader(), ckpt_path=path)
    with pytest.raises(lp.StateError, match=BROKEN[change]):
        lp.load_from_checkpoint(Toy, path)


class Other(lp.LoRA):
    """A method class with another name."""


OTHERS: dict[str, tuple[Any, str]] = {
    "rank": (lambda: lora(r=2), "r=4, but this run has r=2"),
    "alpha": (lambda: lora(alpha=3), "alpha=16, but this run has alpha=3"),
    "scaling": (lambda: lora(use_rslora=True), "use_rslora=False"),
    "name": (lambda: lora(name="other"), "named 'default', but this run attaches only"),
    "method": (
        lambda: Other(r=4, trainable=["head"]),
        "'default' is a LoRA in the checkpoint, but a Other in this run",
    ),
    "targets": (lambda: lora(targets=["body.0"]), "body.4.adapters.default.lora_A"),
    "heads": (lambda: lora(trainable=[]), "head.weight"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_method_names_the_option(tmp_path: Path, what: str) -> None:
    make, message = OTHERS[what]
    path = trained(tmp_path)
    for stage in ("fit",) if what == "heads" else ("fit", "test"):
        with pytest.raises(lp.StateError, match=message):
            getattr(trainer(tmp_path, method=make()), stage)(Toy(), loader(), ckpt_path=path)


def test_another_base(tmp_path: Path) -> None:
    path = trained(tmp_path)
    for stage in ("fit", "test"):
        with pytest.raises(lp.StateError, match=r"different base model.*body.0.weight"):
            getattr(trainer(tmp_path), stage)(Toy(base_seed=8), loader(), ckpt_path=path)
    with pytest.raises(lp.StateError, match="different base model"):
        lp.load_from_checkpoint(Toy, path, base_seed=8)
    with pytest.raises((lp.StateError, RuntimeError), match=r"body\.0"):
        lp.load_from_checkpoint(Toy, path, width=32)


def test_options_that_may_change(tmp_path: Path) -> None:
    path = trained(tmp_path)
    trainer(tmp_path, method=lora(dropout=0.0, seed=5, audit="warn")).fit(Toy(), loader(), ckpt_path=path)


class Payload:
    def __reduce__(self) -> Any:
        return (exec, ("import sys; sys.modules['payload_ran'] = sys",))


def poison(state: Any) -> None:
    state["extra"] = Payload()


def test_a_pickle_payload_is_refused(tmp_path: Path) -> None:
    path = edited(trained(tmp_path), poison)
    with pytest.raises(lp.StateError, match=r"was not read, because reading it would run"):
        lp.load_from_checkpoint(Toy, path)
    for stage in ("fit", "test"):
        for options in ({}, {"weights_only": True}):  # the default must be safe too
            with pytest.raises(lp.StateError, match=r"edited.ckpt was not read"):
                getattr(trainer(tmp_path), stage)(Toy(), loader(), ckpt_path=path, **options)
    assert "payload_ran" not in sys.modules


def hostile(state: Any) -> None:
    state["hyper_parameters"] |= {"_instantiator": "antigravity.nothing", "_class_path": "antigravity.Nothing"}
    state["hparams_name"] = "kwargs"


def unknown(state: Any) -> None:
    state["lightning_peft"]["methods"][0]["method"] = "antigravity.Nothing"


def test_class_names_in_a_file_are_never_imported(tmp_path: Path) -> None:
    path = trained(tmp_path)
    module = lp.load_from_checkpoint(Toy, edited(path, hostile))
    assert "_class_path" not in module.hparams
    with pytest.raises(lp.StateError, match=r"edited.ckpt: no method named 'antigravity.Nothing'; defined are"):
        lp.load_from_checkpoint(Toy, edited(path, unknown))
    with pytest.raises(lp.StateError, match="antigravity"):
        trainer(tmp_path).fit(Toy(), loader(), ckpt_path=edited(path, unknown))
    assert "antigravity" not in sys.modules


def test_plain_checkpoint_of_the_base_loads_by_hand(tmp_path: Path) -> None:
    base = Toy(base_seed=8)
    module = Toy()
    lp.apply(module, lora())
    module.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(module.body[0].weight, base.body[0].weight)


# Frozen state, and state that may change


class Watched(Toy):
    def base(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in self.state_dict().items() if "adapters" not in k and "head" not in k}


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
def test_frozen_stays_frozen(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Watched()
    before = module.base()
    trainer(tmp_path, enable_checkpointing=False, **options).fit(module, loader(), val_loader())
    assert same(module.base(), before)
    assert not module.body[1].training


def test_norm_statistics_that_may_move_are_saved(tmp_path: Path) -> None:
    module = Watched()
    before = module.base()
    path = trained(tmp_path, module, lora(train_norm_stats=True))
    moved = {k for k, v in module.base().items() if not torch.equal(v, before[k])}
    assert moved == {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    assert moved < set(torch.load(path, weights_only=True)["state_dict"])
    again = lp.load_from_checkpoint(Toy, path)
    assert same(dict(again.state_dict()), dict(module.state_dict()))


# Precision


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_trainables_keep_their_precision(tmp_path: Path, precision: str) -> None:
    losses: list[float] = []

    class Recorded(Toy):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = super().training_step(batch, index)
            losses.append(float(loss))
            return loss

    def dtypes(module: nn.Module) -> set[torch.dtype]:
        return {p.dtype for p in module.parameters() if p.requires_grad}

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    module = Recorded(lr=0.02)
    run = trainer(tmp_path, save, precision=precision, max_epochs=6)
    run.fit(module, loader(), val_loader())
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert dtypes(module) == {wanted}
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    again = Recorded(lr=0.02)
    resumed = trainer(tmp_path, precision=precision, max_epochs=6, enable_checkpointing=False)
    resumed.fit(again, loader(), val_loader(), ckpt_path=tmp_path / "step=10.ckpt")
    assert dtypes(again) == {wanted}
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    saved = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["state_dict"]
    assert {v.dtype for v in saved.values()} == {wanted}
