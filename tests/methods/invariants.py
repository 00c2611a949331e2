"""Shared by the tests of weight methods: small models, a matrix reference, and the invariants of every method."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.core.adapters.effective_weights import effective_weights
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.state.state_dict import load_state
from tests.helpers import close, perturb

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 8)),
    "unbatched, no bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 7, 8)),
    "stride, padding": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(2, 1)), (2, 4, 7, 8)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=(2, 1), padding=2), (2, 4, 7, 8)),
    "same, not square": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), (2, 4, 9, 9)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular"), (2, 4, 7, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 7, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2), (2, 4, 11)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), groups=2, padding=1), (2, 4, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=3, groups=2, output_padding=2), (2, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, (1, 2, 3), (1, 2, 1), groups=2, padding=1), (2, 4, 3, 4, 5)),
}


def layer_kinds() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]]:
    """Layers of several kinds, and inputs for each."""
    from transformers.pytorch_utils import Conv1D

    ids = torch.tensor([[1, 8, 1], [0, 3, 3]])
    kinds: dict[str, Any] = {
        "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
        "linear 1-D, no bias": (lambda: nn.Linear(8, 6, bias=False), lambda: torch.randn(8)),
        "linear 4-D": (lambda: nn.Linear(8, 6), lambda: torch.randn(2, 3, 2, 8)),
        "Conv1D": (lambda: _wide(Conv1D(6, 8)), lambda: torch.randn(3, 8)),
        "embedding": (lambda: nn.Embedding(9, 6), lambda: ids),
        "own forward": (lambda: _Scaled(8, 6), lambda: torch.randn(3, 8)),
    }
    for name, (make, shape) in CONVOLUTIONS.items():
        kinds[name] = make, functools.partial(torch.randn, shape)
    return kinds


KINDS = layer_kinds()


def _wide(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(x, self.weight / 2, self.bias) * 2


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def check_against_matrix(make: Callable[..., lp.PEFTMethod], kind: str, **options: Any) -> None:
    """Outputs, gradients and the merged layer equal those of the plain layer with the transformed weight."""
    torch.manual_seed(0)
    build, inputs = KINDS[kind]
    model = nn.ModuleDict({"layer": build().double()})
    plain = copy.deepcopy(model["layer"])
    lp.apply(model, make(targets=["layer"], adapter_dtype="float64", **options))
    perturb(model)
    layer, x = model["layer"], inputs()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    weights = effective_weights(layer, layer.adapters.running())
    expected = functional_call(plain, weights, (x,))
    output = layer(x)
    close(output, expected, 1e-11)
    assert (output - plain(x)).abs().max() > 1e-3
    wanted = [p for p in layer.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    upstream = torch.randn_like(output)
    for mine, reference in zip(
        torch.autograd.grad(output, wanted, upstream), torch.autograd.grad(expected, wanted, upstream)
    ):
        close(mine, reference, 1e-10)
    before = layer.weight.detach().clone()
    lp.merge(model)
    close(layer(x), output, 1e-11)
    lp.unmerge(model)
    assert torch.equal(layer.weight, before)


def check_invariants(make: Callable[..., lp.PEFTMethod], count: int, *, exact: bool = True) -> None:
    """Test identity at the start, parameter count, merge, disable, save and load, copies, two adapters, half
    precision.
    """
    base, x = net(), torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    model = net()
    report = lp.apply(model, make())
    assert report.trainable == count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lp.inspect(net(), make()).trainable == count
    start = model(x)
    assert torch.equal(start, base(x)) if exact else (start - base(x)).abs().max() < 1e-6
    perturb(model)
    moved = model(x)
    assert (moved - start).abs().max() > 1e-3
    with lp.disabled(model):
        assert torch.equal(model(x), base(x))

    other = net()
    lp.apply(other, make(seed=99))
    load_state(other, lp.adapter_state(model))
    assert torch.equal(other(x), moved)
    assert torch.equal(copy.deepcopy(model)(x), moved)
    torch.save(model, "model.pt")
    assert torch.equal(torch.load("model.pt", weights_only=False)(x), moved)

    weights = {k: v.clone() for k, v in base.state_dict().items()}
    lp.merge(model)
    close(model(x), moved)
    lp.unmerge(model)
    assert torch.equal(model(x), moved)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())

    for second in (lp.LoRA(r=2, name="second"), make(name="second", seed=5)):
        both = net()
        lp.apply(both, make(), second)
        perturb(both, scale=0.2)
        _forward_is_merge(both, x)
        both = net()
        lp.apply(both, second)
        perturb(both, scale=0.2)
        lp.apply(both, make(name="third"))
        with lp.active(both, "second"):
            one = both(x)
        close(both(x), one)
        perturb(both, scale=0.2, name="third")
        _forward_is_merge(both, x)

    half = net().bfloat16()
    lp.apply(half, make())
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    perturb(half, scale=0.1)
    output = half(x.bfloat16())
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    lp.merge(half)
    close(half(x.bfloat16()), output, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net()
        lp.apply(mixed, make())
        perturb(mixed, scale=0.1)
        mixed(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixed.parameters() if p.requires_grad)

    plain = lp.unload(model)
    assert plain.state_dict().keys() == weights.keys()
    assert type(plain[0]) is nn.Linear


def _forward_is_merge(model: nn.Module, x: Tensor) -> None:
    for training in (True, False):
        output = model.train(training)(x)
        lp.merge(model)
        close(model(x), output)
        lp.unmerge(model)
        assert torch.equal(model(x), output)


def check_checkpointed_and_compiled(make: Callable[..., lp.PEFTMethod]) -> None:
    """Gradient checkpointing gives the same gradients; ``torch.compile`` needs no graph break."""
    from torch.utils.checkpoint import checkpoint

    model, x = net(), torch.randn(5, 8)
    lp.apply(model, make())
    perturb(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(x).square().sum(), trained)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again))
    torch._dynamo.reset()  # torch limits recompilations per function, and every test compiles the same few functions
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        model.train(training)
        close(compiled(x), model(x))


class Task(L.LightningModule):
    """A regression with a schedule; ``body`` is adapted and the head trains."""

    def __init__(self, groups: bool = False, schedule: str = "lambda") -> None:
        super().__init__()
        self.body = net()
        self.groups, self.schedule = groups, schedule
        self.rates: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append([group["lr"] for group in self.optimizers().param_groups])  # type: ignore[union-attr]
        return (self.body(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        parameters: Any = lp.trainable_parameters(self)
        if self.groups:
            decayed = [p for p in parameters if p.ndim > 1]
            parameters = [
                {"params": decayed, "weight_decay": 0.3},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-3},
            ]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        scheduler = {
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=12),
        }[self.schedule]()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    rows = TensorDataset(torch.randn(24, 8, generator=generator), torch.randn(24, 3, generator=generator))
    return DataLoader(rows, 4, shuffle=True)


def trainer(method: lp.PEFTMethod, steps: int, folder: str = "a") -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[method, ModelCheckpoint(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")],
    )


def check_fit(make: Callable[..., lp.PEFTMethod], **task: Any) -> tuple[Task, Task]:
    """A run that stops after 3 of 8 steps and resumes equals an uninterrupted one bit for bit; its checkpoint loads
    alone.
    """
    L.seed_everything(4, verbose=False)
    whole, loaded = Task(**task), Task(**task)
    base = {k: v.clone() for k, v in whole.state_dict().items()}
    trainer(make(), 8).fit(whole, loader())
    L.seed_everything(4, verbose=False)
    trainer(make(), 3, "b").fit(Task(**task), loader())
    resumed = Task(**task)
    L.seed_everything(77, verbose=False)
    trainer(make(), 8, "b").fit(resumed, loader(), ckpt_path="b/step=3.ckpt")
    state = lp.adapter_state(whole)
    assert state
    assert all(torch.equal(state[k], v) for k, v in lp.adapter_state(resumed).items())
    assert all(torch.equal(whole.state_dict()[k], v) for k, v in base.items())
    saved = torch.load("a/step=3.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == state.keys()
    loaded = lp.load_from_checkpoint(Task, "b/step=6.ckpt", **task)
    reference = torch.load("a/step=6.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, reference[k]) for k, v in lp.adapter_state(loaded).items())
    return whole, resumed


def peft_model(base: nn.Module, config: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(base, config)


def check_parity(
    ours: lp.PEFTMethod, config: Any, base: nn.Module, x: Tensor, names: dict[str, str], gradients_too: bool = True
) -> None:
    """From the same weights, outputs and gradients equal those of PEFT 0.21.2.

    Args:
        names: our parameter's name in an adapter, and the dotted path to PEFT's below its layer.
        gradients_too: False if PEFT's gradients are wrong.
    """
    model, theirs = copy.deepcopy(base), peft_model(copy.deepcopy(base), config).train()
    report = lp.apply(model, ours)
    perturb(model)
    assert report.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    pairs = []
    for name, host in hosts(model):
        for key, parameter in host.adapters["default"].named_parameters():
            path = names.get(key)
            if path is None:
                continue
            other = theirs.base_model.model.get_submodule(name)
            for part in path.split("."):
                other = other[part] if part == "default" and hasattr(other, "keys") else getattr(other, part)
            with torch.no_grad():
                other.copy_(parameter.reshape(other.shape))
            pairs.append((parameter, other))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    outputs, gradients = [], []
    for module, index in ((model, 0), (theirs, 1)):
        given = x.clone().requires_grad_() if x.is_floating_point() else x
        outputs.append(module(given))
        outputs[-1].square().sum().backward()
        gradients.append([pair[index].grad for pair in pairs] + ([given.grad] if x.is_floating_point() else []))
    close(outputs[0], outputs[1], 2e-5)
    for mine, other in zip(*gradients) if gradients_too else ():
        scale = other.abs().max().clamp(min=1)
        close(mine / scale, other.reshape(mine.shape) / scale, 2e-5)
