"""Test that a ``forward`` set on the instance, as by accelerate or fused kernels, does not hide adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_peft as lp
from tests.helpers import close, differ, perturb
from tests.models import MLP

METHODS = {
    "lora": lp.LoRA(r=2),
    "dora": lp.DoRA(r=2),
    "ssf": lp.SSF(),
    "bottleneck": lp.BottleneckAdapter(bottleneck_size=2, targets=["up", "mid", "down"]),
    "lora and head": lp.LoRA(r=2, trainable="head"),
}
X = torch.linspace(-1, 1, 12).view(2, 6)


def hook(module: nn.Module) -> None:
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]


def hook_by_class(module: nn.Module) -> None:
    """A forward set on the instance that looks its class up when it runs, as compressed-tensors does."""
    module.forward = lambda *args: module.__class__.forward(module, *args)  # type: ignore[method-assign]


def hooked(hook: Callable[[nn.Module], None] = hook) -> nn.Module:
    model = net()
    for module in (model.up, model.mid, model.down, model.head):
        hook(module)
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


def with_(method: lp.PEFTMethod, model: nn.Module) -> nn.Module:
    lp.apply(model, method)
    return perturb(model).eval()


@pytest.mark.parametrize("hook", [hook, hook_by_class])
@pytest.mark.parametrize("name", METHODS)
def test_adapters_run_around_a_forward_that_was_there(name: str, hook: Callable[[nn.Module], None]):
    method, model = METHODS[name], hooked(hook)
    own = {n: m.forward for n, m in model.named_children()}
    base = model(X)
    output = with_(method, model)(X)
    differ(output, base)
    close(output, with_(method, net())(X))
    if name != "bottleneck":
        lp.merge(model)
        close(model(X), output)
    lp.unload(model)
    assert {n: m.forward for n, m in model.named_children()} == own
    assert all(type(m) is nn.Linear for m in model.children())


def test_a_forward_that_computes_something_else_runs_with_the_adapted_weight():
    model = net()
    model.mid.forward = lambda x: F.linear(x, model.mid.weight) * 2  # type: ignore[method-assign]
    output = with_(lp.LoRA(r=2), model)(X)
    lp.merge(model)
    close(model(X), output)


def test_hooks_of_accelerate_can_be_added_and_removed():
    hooks = pytest.importorskip("accelerate.hooks")
    model, expected = net(), with_(lp.LoRA(r=2), net())(X)
    before, after = hooks.ModelHook(), hooks.ModelHook()
    hooks.add_hook_to_module(model.up, before)
    with_(lp.LoRA(r=2), model)
    hooks.add_hook_to_module(model.mid, after)
    close(model(X), expected)
    hooks.remove_hook_from_module(model.up)
    hooks.remove_hook_from_module(model.mid)
    close(model(X), expected)
    assert "forward" not in vars(model.mid)
    close(copy.deepcopy(model)(X), expected)
    lp.unload(model)
    close(model(X), net()(X))


def test_a_later_forward_that_skips_the_adapters_is_an_error_at_its_first_call():
    model = with_(lp.LoRA(r=2), net())
    model.mid.forward = lambda x: F.linear(x, model.mid.weight)  # type: ignore[method-assign]
    with lp.disabled(model):
        model(X)
    with pytest.raises(RuntimeError, match="the adapters of a Linear did not run: its forward was replaced"):
        model(X)


def test_a_replaced_forward_may_call_its_module_again():
    model = with_(lp.LoRA(r=2), net())
    inner, expected = model.mid.forward, model(X)
    model.mid.forward = lambda x, again=True: model.mid(x, False) if again else inner(x)  # type: ignore[method-assign]
    close(model(X), expected)
    close(model(X), expected)
