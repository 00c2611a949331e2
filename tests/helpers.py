"""Functions on models that many tests use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts
from tests.kinds import Kind
from tests.table import Row


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that adapters own, by key."""
    stacks = [f"{host}.adapters.{name or ''}".lstrip(".") for host, _ in hosts(model)]
    return {k: p for k, p in model.named_parameters() if any(k.startswith(s) for s in stacks)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by key; a tied parameter under each of its keys."""
    return {k: p for k, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def perturb(model: nn.Module, seed: int = 7, scale: float = 0.15, name: str | None = None) -> nn.Module:
    """Change every adapter parameter as training would; without adapters, change the trained base parameters."""
    generator = torch.Generator().manual_seed(seed)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in (adapter_parameters(model, name) or trained).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return model


def adapted(row: Row, kind: Kind, *, moved: bool = True, **options: Any) -> nn.Module:
    """A model of ``kind`` with the method applied; ``moved`` changes the adapters' initial values."""
    model = kind.build()
    lp.apply(model, row.make(kind, **options))
    return perturb(model) if moved else model


def bits(model: nn.Module, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
    """A copy of the state dict, or of ``keys`` of it."""
    wanted = None if keys is None else set(keys)
    return {k: v.detach().clone() for k, v in model.state_dict().items() if wanted is None or k in wanted}


def assert_same_bits(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    changed = [k for k in now if now[k].dtype != before[k].dtype or not torch.equal(now[k], before[k])]
    assert not changed, f"changed: {changed}"


def classes(model: nn.Module) -> list[tuple]:
    """The class of each module and its base classes; torch makes a class for each layer that it parametrizes."""
    return [(type(m).__name__, *type(m).__mro__[1:]) for m in model.modules()]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same(kind: Kind, a: Tensor, b: Tensor) -> None:
    """Compare outputs: bit for bit, unless torch may use different kernels."""
    if kind.fast_path:
        close(a, b)
    else:
        assert torch.equal(a, b)


def differ(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() > 1e-3, "the adapters make no difference"


@torch.no_grad()
def evaluate(model: nn.Module, kind: Kind) -> Tensor:
    """The output in eval mode; the model's mode is restored."""
    mode = model.training
    try:
        return model.eval()(*kind.batch())
    finally:
        model.train(mode)


def assert_compiled_gradients(compiled: Any, model: nn.Module, *batch: Tensor) -> None:
    """Check that backward through ``compiled`` gives the same gradients as through ``model``."""
    model.zero_grad()
    compiled(*batch).pow(2).mean().backward()
    gradients = [p.grad.clone() for p in lp.trainable_parameters(model)]
    model.zero_grad()
    model(*batch).pow(2).mean().backward()
    for ours, parameter in zip(gradients, lp.trainable_parameters(model)):
        close(ours, parameter.grad)
