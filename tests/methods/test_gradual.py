"""Gradual unfreezing: the schedule, checkpoints in both directions, two processes."""

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_peft as lp
from tests.methods.families.test_selection import ConvNet, Module, bert, mlp, names, trained, trainer


class Watch(L.Callback):
    """Records what trains, at each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(len([p for p in module.parameters() if p.grad is not None]))


def test_unfreezing_schedule():
    model = bert()
    method = lp.GradualUnfreezing(schedule=[1, 2, 2], trainable=["classifier"])
    report = lp.apply(model, method)
    head = names(model, "pooler", "classifier")
    assert trained(model) == head
    assert report.trainable == sum(p.numel() for n, p in model.named_parameters() if n in head)
    assert report.modules["bert.encoder.layer.2"] == "trains from epoch 1"
    assert lp.inspect(bert(), method).trainable == report.trainable
    assert method.advance(model, 0) == []
    assert set(method.advance(model, 1)) == names(model, "layer.2.")
    assert method.advance(model, 1) == []
    assert set(method.advance(model, 7)) == names(model, "layer.0.", "layer.1.")
    assert trained(model) == head | names(model, "encoder.layer")
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_ends_with_the_embeddings():
    model = bert()
    method = lp.GradualUnfreezing(every=2, exclude=["LayerNorm"])
    lp.apply(model, method)
    assert method.times(model) == [2, 4, 6, 8]
    method.advance(model, 6)
    assert not trained(model) & names(model, "embeddings", "LayerNorm")
    method.advance(model, 8)
    assert trained(model) == names(model, "") - names(model, "LayerNorm")


@pytest.mark.parametrize(("unit", "times"), [("epoch", [1, 2]), ("step", [3, 4])])
def test_in_a_trainer(unit, times):
    watch = Watch()
    trainer([lp.GradualUnfreezing(schedule=times, unit=unit), watch], max_epochs=3).fit(Module())
    first, second = (4 * t if unit == "epoch" else t for t in times)
    assert watch.seen == [2] * first + [4] * (second - first) + [6] * (12 - second)


def test_accumulated_steps_count_once():
    watch = Watch()
    method = lp.GradualUnfreezing(schedule=[1, 2], unit="step")
    trainer([method, watch], max_epochs=1, accumulate_grad_batches=2).fit(Module())
    assert watch.seen == [2, 4]


def test_an_earlier_checkpoint_loads_again(tmp_path):
    """The best checkpoint, tested after training: parameters that were frozen in it have the base's values again."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    t = trainer([lp.GradualUnfreezing(), saving], max_epochs=3, enable_checkpointing=True)
    module = Module()
    base = copy.deepcopy(module.state_dict())
    t.fit(module)
    assert len(lp.adapter_state(module)) == 6
    module.test_step = module.training_step
    t.test(module, module.train_dataloader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    stored = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {"net.4.weight", "net.4.bias"} == trained(module)
    assert all(torch.equal(v, {**base, **stored}[k]) for k, v in module.state_dict().items())
    again = lp.load_from_checkpoint(Module, tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in
               torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["state_dict"].items())  # fmt: skip


def test_loading_a_base_checkpoint_by_hand_unfreezes_nothing():
    module = Module()
    state = {k: v + 1 for k, v in module.state_dict().items()}
    t = trainer(lp.GradualUnfreezing(), max_epochs=1)
    t.fit(module)
    module.load_state_dict(state)
    assert trained(module) == {"net.4.weight", "net.4.bias"}
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_norm_statistics_move_once_their_layer_is_unfrozen():
    model = ConvNet()
    method = lp.GradualUnfreezing(schedule=[1])
    lp.apply(model, method)
    x = torch.randn(4, 1, 8, 8)
    model.train()(x)
    assert not any("running" in key for key in lp.adapter_state(model))
    method.advance(model, 1)
    model(x)
    assert {k for k in lp.adapter_state(model) if "mean" in k} == {"blocks.2.norm.running_mean"}


class Two(Module):
    """Each rank trains on a different half of the same data."""

    def train_dataloader(self):
        data = super().train_dataloader().dataset
        mine = torch.utils.data.Subset(data, range(self.trainer.global_rank, len(data), 2))
        return torch.utils.data.DataLoader(mine, batch_size=4, shuffle=False)

    def on_train_end(self):
        for name, p in self.named_parameters():
            everywhere = [torch.empty_like(p) for _ in range(2)]
            torch.distributed.all_gather(everywhere, p.detach())
            assert torch.equal(*everywhere), f"{name} differs between the ranks"


def test_two_processes_agree_with_one(tmp_path):
    method = lp.GradualUnfreezing(schedule=[1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = trainer(method, max_epochs=3, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
        t.fit(Two())
    one = ModuleInOrder()
    trainer(lp.GradualUnfreezing(schedule=[1, 2]), max_epochs=3).fit(one)
    for p, q in zip(t.lightning_module.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


class ModuleInOrder(Module):
    """One process that sees what the two see together: rank 0 takes the even rows, rank 1 the odd ones."""

    def train_dataloader(self):
        data = super().train_dataloader().dataset
        return torch.utils.data.DataLoader(data, batch_size=8, shuffle=False)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"schedule": []}, "schedule must be a list of epoch numbers of at least 0"),
            ({"schedule": [1, -2]}, "schedule must be a list of epoch numbers of at least 0"),
            ({"schedule": [3, 2]}, "schedule must be in ascending order"),
            ({"unit": "batch"}, "unit must be one of 'epoch', 'step'"),
            ({"every": 0}, "every must be an integer of at least 1"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            lp.GradualUnfreezing(**options)

    def test_past_the_last_block(self):
        with pytest.raises(lp.TargetError, match=r"goes past the last block: it has 3 entries, and Sequential has 2"):
            lp.apply(mlp(), lp.GradualUnfreezing(schedule=[1, 2, 3]))

    def test_nothing_to_train_in_the_first_stage(self):
        model = nn.LSTM(2, 2)
        with pytest.raises(lp.TargetError, match="finds nothing to train before epoch 1"):
            lp.apply(nn.ModuleDict({"a": model, "b": nn.LSTM(2, 2)}), lp.GradualUnfreezing(exclude=["b"]))

    def test_strategies_that_fix_what_trains(self):
        t = trainer(lp.GradualUnfreezing())
        t.strategy.__class__ = type("DeepSpeedStrategy", (type(t.strategy),), {})
        with pytest.raises(MisconfigurationException, match="is not supported with DeepSpeedStrategy"):
            t.fit(Module())
