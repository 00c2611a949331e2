"""Splitting groups after the scheduler was built gives the same result as building both with split groups."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as S

from lightning_peft.trainer.param_groups import optimizers_in, remember_schedulers, schedulers_in, split_groups

# One entry per group: [weights, biases] before; after the split, biases have a tenth of the rate.
# Each builds the scheduler for rates (a list, one for each group) and the factor that each group has.
SCHEDULERS = {
    "lambda": lambda o, f: S.LambdaLR(o, lambda step: 1 / (1 + step)),
    "lambdas": lambda o, f: S.LambdaLR(o, [_first, _second] if len(f) == 2 else [_first, _first, _second, _second]),
    "multiplicative": lambda o, f: S.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o, f: S.StepLR(o, 3, 0.5),
    "multistep": lambda o, f: S.MultiStepLR(o, [2, 5], 0.5),
    "constant": lambda o, f: S.ConstantLR(o, 0.3, 4),
    "linear": lambda o, f: S.LinearLR(o, 0.1, 1.0, 6),
    "exponential": lambda o, f: S.ExponentialLR(o, 0.8),
    "polynomial": lambda o, f: S.PolynomialLR(o, 7, 2.0),
    "cosine": lambda o, f: S.CosineAnnealingLR(o, 7),
    "restarts": lambda o, f: S.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o, f: S.CyclicLR(o, [0.01 * x for x in f], [0.1 * x for x in f], 3, cycle_momentum=False),
    "onecycle": lambda o, f: S.OneCycleLR(o, [0.1 * x for x in f], total_steps=12, cycle_momentum=False),
    "sequential": lambda o, f: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 3), S.CosineAnnealingLR(o, 5)], [3]),
    "chained": lambda o, f: S.ChainedScheduler([S.ConstantLR(o, 0.3, 4), S.ExponentialLR(o, 0.9)]),
    "plateau": lambda o, f: S.ReduceLROnPlateau(o, patience=0, min_lr=[0.02 * x for x in f]),
}


def _first(step):
    return 0.9**step


def _second(step):
    return 0.8**step


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def _build(kind, split):
    """Two groups (one for each layer), or the four groups after splitting them by kind of parameter."""
    net = _net()
    if split:
        parts = [[layer.weight] for layer in net], [[layer.bias] for layer in net]
        groups = [
            {"params": p, "lr": lr * scale, "weight_decay": wd}
            for lr, wd, pair in zip((0.1, 0.2), (0.0, 0.3), zip(*parts))
            for p, scale in zip(pair, (1, 0.1))
        ]
    else:
        groups = [
            {"params": list(net[0].parameters()), "lr": 0.1, "weight_decay": 0.0},
            {"params": list(net[1].parameters()), "lr": 0.2, "weight_decay": 0.3},
        ]
    optimizer = torch.optim.AdamW(groups)
    return net, optimizer, SCHEDULERS[kind](optimizer, [1, 0.1, 1, 0.1] if split else [1, 1])


def _train(net, optimizer, scheduler, steps):
    rates = []
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step(*[step] if isinstance(scheduler, S.ReduceLROnPlateau) else [])
        rates.append([(g["lr"], g["weight_decay"]) for g in optimizer.param_groups])
        assert scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
    return rates


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_split_after_the_scheduler_equals_split_before(kind):
    net, optimizer, scheduler = _build(kind, split=False)
    remember_schedulers({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}})
    biases = {id(layer.bias) for layer in net}
    groups = optimizer.param_groups
    split_groups(optimizer, lambda p: {"lr_scale": 0.1} if id(p) in biases else {})
    assert optimizer.param_groups is groups
    want_net, want_optimizer, want_scheduler = _build(kind, split=True)
    got, want = _train(net, optimizer, scheduler, 8), _train(want_net, want_optimizer, want_scheduler, 8)
    assert torch.tensor(got, dtype=torch.float64).allclose(torch.tensor(want, dtype=torch.float64), rtol=1e-12)
    for a, b in zip(net.parameters(), want_net.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_split_scheduler_resumes(kind):
    def split():
        net, optimizer, scheduler = _build(kind, split=False)
        biases = {id(layer.bias) for layer in net}
        split_groups(optimizer, lambda p: {"lr_scale": 0.1} if id(p) in biases else {}, [scheduler])
        return net, optimizer, scheduler

    whole = split()
    want = _train(*whole, 8)
    net, optimizer, scheduler = split()
    _train(net, optimizer, scheduler, 4)
    other_net, other_optimizer, other_scheduler = split()
    other_net.load_state_dict(net.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    other_scheduler.load_state_dict(scheduler.state_dict())
    rest = _train(other_net, other_optimizer, other_scheduler, 4)
    if kind != "plateau":  # it counts the metric of the loop above
        assert rest == want[4:]
    for a, b in zip(other_net.parameters(), whole[0].parameters()):
        assert kind == "plateau" or torch.equal(a, b)


def test_splits_compose_and_keep_options_order_and_names():
    net = _net()
    optimizer = torch.optim.SGD(
        [{"params": list(net.named_parameters()), "name": "all", "momentum": 0.7, "nesterov": True}], lr=0.1
    )
    names = {id(p): n for n, p in net.named_parameters()}
    split_groups(optimizer, lambda p: {"lr_scale": 2.0} if "0" in names[id(p)] else {})
    split_groups(optimizer, lambda p: {"lr_scale": 5.0, "weight_decay": 0.1} if "bias" in names[id(p)] else {})
    seen = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert seen == [["0.weight"], ["0.bias"], ["1.weight"], ["1.bias"]]
    assert [g["param_names"] for g in optimizer.param_groups] == seen
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 1.0, 0.1, 0.5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0, 0.1, 0, 0.1]
    assert all(g["momentum"] == 0.7 and g["nesterov"] for g in optimizer.param_groups)
    assert len({g["name"] for g in optimizer.param_groups}) == 4


def test_empty_groups_stay_and_tensor_rates_are_not_shared():
    net = _net()
    groups = [{"params": []}, {"params": list(net.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.1), foreach=False)
    kinds = {id(p): p.ndim for p in net.parameters()}
    split_groups(optimizer, lambda p: {"lr_scale": 1.0 if kinds[id(p)] == 1 else 0.5})
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 2, 2]
    assert len({id(g["lr"]) for g in optimizer.param_groups}) == 3
    assert [round(float(g["lr"]), 6) for g in optimizer.param_groups] == [0.1, 0.05, 0.1]


def test_what_configure_optimizers_may_return():
    optimizer = torch.optim.SGD(_net().parameters(), lr=0.1)
    a, b = S.StepLR(optimizer, 1), S.ReduceLROnPlateau(optimizer)
    for configured in (
        {"optimizer": optimizer, "lr_scheduler": {"scheduler": a, "interval": "step", "monitor": "x"}},
        ([optimizer], [{"scheduler": a, "interval": "step"}]),
        ({"optimizer": optimizer, "lr_scheduler": a},),
    ):
        assert list(optimizers_in(configured)) == [optimizer]
        assert list(schedulers_in(configured)) == [a]
    assert list(schedulers_in(([optimizer], [a, b]))) == [a, b]
    assert list(schedulers_in(optimizer)) == list(schedulers_in(None)) == []


def test_errors():
    optimizer = torch.optim.SGD(_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'betas' cannot be set for a part of a group of SGD"):
        split_groups(optimizer, lambda p: {"betas": (0.9, 0.9)})
    with pytest.raises(ValueError, match="lr_scale must be above 0, got 0"):
        split_groups(optimizer, lambda p: {"lr_scale": 0})
    with pytest.raises(ValueError, match="lr_scale"):
        split_groups(optimizer, lambda p: {"lr": 0.1})
