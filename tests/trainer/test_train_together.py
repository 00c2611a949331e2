"""With ``TrainTogether``, every adapter ends with the values that it has when it is trained alone."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertModel

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import stacks
from tests.methods import tiny
from tests.methods.fitting import SMALL
from tests.trainer.toys import same


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL | {"num_hidden_layers": 1}), add_pooling_layer=False).eval()


class Model(L.LightningModule):
    """An encoder and a head in float64, with a metric and a list of its own."""

    base_of = staticmethod(bert)

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.base = self.base_of()
        self.head = nn.Linear(16, 3)
        self.score = MulticlassAccuracy(3, average="micro")
        self.losses: list[float] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output = self.base(x)
        return self.head((output if isinstance(output, Tensor) else output.last_hidden_state).mean(1))

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("first_loss", self.losses[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.score(self(batch[0]), batch[1])
        self.log("score", self.score)
        self.log("val_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8), "interval": "step"}]


class Counted(Model):
    """Counts the calls of the base in training."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.calls = [0]
        self.base.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls[0] += self.trainer.training


def data(seed: int = 1, length: int = 5, rows: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 50, (rows, length), generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (rows,), generator=generator))


def loader(seed: int = 1, length: int = 5, rows: int = 8) -> DataLoader:
    return DataLoader(data(seed, length, rows), 4, shuffle=True, generator=torch.Generator().manual_seed(2))


def fit(model: L.LightningModule, *callbacks: Any, loaders: Any = None, epochs: int = 2, **options: Any) -> L.Trainer:
    checkpoint, validation = options.pop("ckpt_path", None), options.pop("validation", ())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {**quiet, "enable_checkpointing": False, "num_sanity_val_steps": 0, "accelerator": "cpu", **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(eval mode at the start|does not have many workers)")
        trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
        trainer.fit(model, loaders or loader(), *validation, ckpt_path=checkpoint)
    return trainer


def validation() -> tuple[DataLoader]:
    return (DataLoader(data(5), 8),)


def lora(name: str, **options: Any) -> lp.LoRA:
    return lp.LoRA(**{"r": 2, "adapter_dtype": "float64", "targets": ["query"], "name": name, **options})


def logits(model: L.LightningModule, *name: str) -> Tensor:
    with torch.no_grad(), lp.active(model.eval(), *name) if name else nullcontext():
        return model.eval()(data(7).tensors[0])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-11)


def alone(method: Any, *callbacks: Any, kind: Any = Model, lr: float = 1e-2, **options: Any) -> tuple[Any, L.Trainer]:
    model = kind(lr)
    return model, fit(model, method, *callbacks, **options)


FULL = {"adapter_dtype": "float64", "trainable": ["head"]}
METHODS: dict[str, Any] = {
    "LoRA": lambda **o: lp.LoRA(r=2, **o),
    "rank5": lambda **o: lp.LoRA(r=5, alpha=3, seed=9, targets=["query", "dense"], **o),
    "DoRA": lambda **o: lp.DoRA(r=2, **o),
    "VeRA": lambda **o: lp.VeRA(r=4, **o),
    "LoHa": lambda **o: lp.LoHa(r=2, **o),
    "LoKr": lambda **o: lp.LoKr(r=2, **o),
    "HiRA": lambda **o: lp.HiRA(r=2, **o),
    "MiSS": lambda **o: lp.MiSS(r=4, **o),
    "OFT": lambda **o: lp.OFT(block_size=4, **o),
    "IA3": lambda **o: lp.IA3(**o),
    "SSF": lambda **o: lp.SSF(**o),
    "AdaLoRA": lambda **o: lp.AdaLoRA(**o),
    "DyLoRA": lambda **o: lp.DyLoRA(r=4, **o),
    "GatedLoRA": lambda **o: lp.GatedLoRA(r=2, **o),
    "BottleneckAdapter": lambda **o: lp.BottleneckAdapter(bottleneck_size=4, **o),
    "PrefixTuning": lambda **o: lp.PrefixTuning(2, **o),
    "PromptTuning": lambda **o: lp.PromptTuning(2, **o),
    "BitFit": lambda **o: lp.BitFit(**o),
    "LinearProbe": lambda **o: lp.LinearProbe(**o),
}


def test_every_method_ends_as_if_trained_alone() -> None:
    together = Model()
    fit(together, *(make(name=name, **FULL) for name, make in METHODS.items()), lp.TrainTogether(), epochs=1)
    for name, make in METHODS.items():
        model, _ = alone(make(name=name, **FULL), epochs=1)
        expected = logits(model)
        assert close(logits(together, name), expected), name
        assert not close(expected, logits(Model())), name


def test_rates_schedules_metrics_and_attributes_are_those_of_a_run_alone() -> None:
    together, hparams = Counted(), {"b": {"lr": 3e-3}}
    make = {"a": lambda: lora("a", **FULL), "b": lambda: lora("b", r=5, seed=4, trainable=["head"])}
    trainer = fit(
        together, *(m() for m in make.values()), lp.TrainTogether(hparams), loaders=loader(), validation=validation()
    )
    assert together.calls == [4 + 4]  # one call a step; in the first two of each epoch, one to compare with
    assert together.losses == []  # each adapter's steps have lists of their own
    assert together.hparams.lr == 1e-2
    for name, rate in (("a", 1e-2), ("b", 3e-3)):
        model, run = alone(make[name](), lr=rate, validation=validation())
        assert close(logits(together, name), logits(model))
        for metric in ("loss", "first_loss", "val_loss", "score"):
            assert close(trainer.callback_metrics[f"{name}/{metric}"], run.callback_metrics[metric]), metric
        part = trainer.optimizers[0].parts[name]
        assert part.param_groups[0]["lr"] == run.optimizers[0].param_groups[0]["lr"]


def test_gradients_are_clipped_and_accumulated_for_each_adapter() -> None:
    options = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    together = Model()
    fit(together, lora("a", alpha=64), lora("b"), lp.TrainTogether(), **options)
    for name, more in (("a", {"alpha": 64}), ("b", {})):
        model, _ = alone(lora(name, **more), **options)
        assert close(logits(together, name), logits(model))


@pytest.mark.parametrize("length", [5, 7])
def test_each_adapter_has_data_of_its_own(length: int) -> None:
    together = Counted()
    parts = {"a": (1, 5), "b": (3, length)}
    loaders = {name: loader(*part) for name, part in parts.items()}
    more = pytest.warns(UserWarning, match="different shapes or dtypes") if length != 5 else nullcontext()
    with more:
        fit(together, lora("a"), lora("b"), lp.TrainTogether(), loaders=loaders)
    # Batches of one length pass the base once, and are compared with a pass alone in the first two steps of each epoch.
    assert together.calls == [8]
    for name, part in parts.items():
        model, _ = alone(lora(name), loaders=loader(*part))
        assert close(logits(together, name), logits(model))
        if length != 5:
            assert torch.equal(logits(together, name), logits(model))  # the same arithmetic


def test_each_adapter_stops_by_itself(tmp_path: Path) -> None:
    hparams = {"b": {"lr": 1e-12}, "c": {"lr": 1e-1}}
    stop = {name: EarlyStopping("val_loss", patience=1, min_delta=1e-6) for name in "bc"}
    together = Counted()
    callback = lp.TrainTogether(hparams, early_stopping=stop, save_to=tmp_path / "out")
    trainer = fit(together, lora("a"), lora("b"), lora("c"), callback, epochs=4, validation=validation())
    stopped = {name: stopper.stopped_epoch for name, stopper in callback._stoppers.items()}
    assert stopped["b"] == 1
    assert trainer.current_epoch == 4
    for name, rate, stopper in (("a", 1e-2, []), ("b", 1e-12, [stop["b"]]), ("c", 1e-1, [stop["c"]])):
        model, run = alone(lora(name), *copy.deepcopy(stopper), lr=rate, epochs=4, validation=validation())
        assert close(logits(together, name), logits(model))
        assert not stopper or not stopped[name] or run.current_epoch == stopped[name] + 1
        fresh = Model()
        lp.load_adapter(fresh, tmp_path / "out" / name)
        assert torch.allclose(logits(fresh, name), logits(together, name), atol=1e-6)  # files hold float32


def test_the_run_ends_when_all_adapters_have_stopped() -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=10)
    trainer = fit(
        Model(), lora("a"), lora("b"), lp.TrainTogether(early_stopping=stop), epochs=9, validation=validation()
    )
    assert trainer.current_epoch == 2
    assert stop.monitor == "val_loss"


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    def run(epochs: int, **options: Any) -> tuple[Model, L.Trainer]:
        model = Plateau()
        stop = {"b": EarlyStopping("val_loss", patience=1, min_delta=10)}
        callbacks = [lora("a", **FULL), lora("b"), lp.TrainTogether({"a": {"lr": 0.1}}, stop)]
        return model, fit(model, *callbacks, epochs=epochs, validation=validation(), **options)

    whole, trainer = run(4)
    _, half = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = run(4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert same(lp.adapter_state(whole), lp.adapter_state(resumed))
    assert same(trainer.optimizers[0].state_dict(), second.optimizers[0].state_dict())
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[0] < 0.1  # the schedule of "a" went on after "b" stopped
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["TrainTogether"]["stopped"] == ["b"]
    loaded = lp.load_from_checkpoint(Plateau, tmp_path / "half.ckpt")
    fresh, _ = run(2)
    assert all(torch.equal(logits(loaded, name), logits(fresh, name)) for name in "ab")
    with pytest.raises(Exception, match="c"):
        fit(Plateau(), lora("a", **FULL), lora("c"), lp.TrainTogether(), ckpt_path=str(tmp_path / "half.ckpt"))


class Plateau(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10)
        return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "val_loss"}


class Shifts(Model):
    """A module whose hook expects the batch of one adapter."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [(batch[0] + 1) % 50, batch[1]]


class ShiftingData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    on_after_batch_transfer = Shifts.on_after_batch_transfer


def test_hooks_of_the_module_see_the_batch_of_one_adapter_and_those_of_the_data_stay() -> None:
    expected, _ = alone(lora("a"), kind=Shifts)
    for kind, loaders in ((Shifts, {"a": loader(), "b": loader(3)}), (Model, ShiftingData())):
        model = kind()
        fit(model, lora("a"), lora("b"), lp.TrainTogether(), loaders=loaders)
        assert close(logits(model, "a"), logits(expected))


class Causal(L.LightningModule):
    """A language model that computes its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.llama(torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def test_a_loss_inside_of_the_network_is_computed_for_each_adapter() -> None:
    together = Causal()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="TrainTogether")
        fit(together, lora("a", targets="all-linear"), lora("b", r=4, targets=["q_proj"]), lp.TrainTogether())
    for name, more in (("a", {"targets": "all-linear"}), ("b", {"r": 4, "targets": ["q_proj"]})):
        model = Causal()
        fit(model, lora(name, **more))
        assert close(logits(together, name), logits(model))


class Twice(Model):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.5 * self(batch[0].flip(0)).square().mean()


class Context(Model):
    def loss(self, batch: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().loss(batch)


class Inside(Model):
    """The module around all adapters, the head's included, returns a loss."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        found = super().forward(x)
        return found if labels is None else nn.functional.cross_entropy(found, labels)

    def loss(self, batch: Any) -> Tensor:
        return self(*batch)


@pytest.mark.parametrize(
    ("kind", "why"), [(Twice, "several times"), (Context, "a context"), (Inside, "tensor of shape")]
)
def test_calls_that_cannot_be_joined_run_for_each_adapter(kind: Any, why: str) -> None:
    together = kind()
    with pytest.warns(UserWarning, match=f"the base runs once for each adapter, because .*{why}"):
        fit(together, lora("a", **FULL), lora("b", trainable=["head"]), lp.TrainTogether())
    for name in "ab":
        model, _ = alone(lora(name, **FULL), kind=kind)
        assert close(logits(together, name), logits(model))


def test_evaluation_is_for_each_adapter_and_the_module_is_left_as_it_was() -> None:
    model = Model()
    before = type(model.head)
    callbacks = [lora("a"), lora("b"), lp.TrainTogether()]
    trainer = fit(model, *callbacks)
    assert not any(stack.active for stack in stacks(model).values())
    assert type(model.head) is before
    assert "_peft_together" not in vars(model)
    assert "plan" not in vars(callbacks[0])
    found = trainer.predict(model, DataLoader(data(7), 8))
    assert found[0].keys() == {"a", "b"}
    assert close(found[0]["a"], logits(model, "a"))
    with pytest.raises(MisconfigurationException, match="No `test_step"):
        trainer.test(model, DataLoader(data(7), 8))


class Interrupted(Model):
    """Records the mode in which its steps run, and ends with an error in the second epoch."""

    modes: list[tuple[str, bool]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).modes.append(("training", self.training))
        if self.current_epoch == 1:
            raise InterruptedError
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        type(self).modes.append(("validation", self.training))
        super().validation_step(batch, batch_idx)


def test_steps_know_the_mode_and_an_interrupted_fit_leaves_adapters_trainable() -> None:
    Interrupted.modes = []
    model = Interrupted()
    stop = EarlyStopping("val_loss", stopping_threshold=100.0)  # stops after the first epoch
    together = lp.TrainTogether(early_stopping={"a": stop})
    with pytest.raises(InterruptedError):
        fit(model, lora("a"), lora("b"), together, validation=validation())
    assert set(Interrupted.modes) == {("training", True), ("validation", False)}
    assert all(p.requires_grad for stack in stacks(model).values() for p in stack.parameters())
