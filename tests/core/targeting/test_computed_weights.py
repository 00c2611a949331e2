"""Compare adapters on layers whose weight is computed from other parameters with those on layers that store it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.trainer.audit import audit_head
from tests.helpers import assert_same_bits, bits, classes, close, differ, perturb

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Symmetric(nn.Module):
    """A parametrization without ``right_inverse``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.log()


def parametrized(by: nn.Module) -> Callable[[nn.Module], nn.Module]:
    def change(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", by, unsafe=True)
        return layer

    return change


COMPUTED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": parametrized(Symmetric()),
    "old weight norm": nn.utils.weight_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
MERGED = ("weight norm", "old weight norm")
OTHERS = [lp.BitFit(), lp.LinearProbe(), lp.LoRA(r=2, targets="up"), lp.LoRA(r=2, exclude=["special", "second"])]
METHODS: dict[str, Callable[..., lp.WeightMethod]] = {
    "lora": lambda **o: lp.LoRA(r=2, **o),
    "dora": lambda **o: lp.DoRA(r=2, **o),
    "oft": lambda **o: lp.OFT(block_size=4, **o),
    "ssf": lambda **o: lp.SSF(**o),
}


def chain(**layers: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, layer in {"up": nn.Linear(4, 8), **layers, "head": nn.Linear(8, 2)}.items():
        model.add_module(name, layer)
    return model


def build(change: Callable[[nn.Linear], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return chain(special=change(nn.Linear(8, 8)), second=change(nn.Linear(8, 8)))


def stored(model: nn.Module) -> nn.Module:
    """A model that stores the weights that ``model`` computes."""
    plain = chain(special=nn.Linear(8, 8), second=nn.Linear(8, 8)).double()
    copy.deepcopy(model).eval()(torch.zeros(1, 4, dtype=torch.float64))
    with torch.no_grad():
        for theirs, ours in zip(plain, model.eval()):
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    model.train()
    return plain


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("method", OTHERS, ids=lambda m: type(m).__name__)
def test_a_computed_weight_elsewhere_does_not_matter(kind: str, method: lp.PEFTMethod):
    model = build(COMPUTED[kind])
    lp.apply(model, method)
    audit_head(model)
    model.train()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(torch.randn(3, 4)).pow(2).mean().backward()
    torch.optim.SGD(lp.trainable_parameters(model), lr=1.0).step()
    assert any(not torch.equal(p, trained[n]) for n, p in model.named_parameters() if n in trained)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("method", METHODS)
def test_a_computed_weight_is_adapted_as_a_stored_one(kind: str, method: str):
    model = build(COMPUTED[kind]).double()
    with torch.no_grad():
        model(torch.randn(3, 4, dtype=torch.float64))  # old spectral norm starts with random vectors
    before, types, plain, x = bits(model), classes(model), stored(model), torch.randn(5, 4, dtype=torch.float64)
    make = METHODS[method]
    lp.inspect(model, make())
    assert_same_bits(bits(model), before)
    for net in (model, plain):
        for name in ("a", "b"):
            lp.apply(net, make(name=name, targets=["special", "second"], adapter_dtype="float64"))
        perturb(net)
    assert_same_bits(lp.adapter_state(model), lp.adapter_state(plain))
    outputs = [net(x) for net in (model, plain)]
    close(*outputs, 1e-12)
    differ(outputs[0], stored(plain)(x))
    gradients = [torch.autograd.grad(y.sum(), lp.trainable_parameters(net)) for net, y in zip((model, plain), outputs)]
    for ours, theirs in zip(*gradients):
        close(ours, theirs, 1e-11)
    adapted = bits(model)
    assert_same_bits({key: adapted[key] for key in before}, before)  # training mode gives the same result
    close(copy.deepcopy(model)(x), outputs[1], 1e-12)
    for name in ("a", "b"):
        for net in (model, plain):
            lp.set_active(net, name)
        close(model(x), plain(x), 1e-12)
    with lp.disabled(model), lp.disabled(plain):
        close(model(x), plain(x), 1e-12)
    with lp.rows(model, ["a", "b", None, "b", "a"]), lp.rows(plain, ["a", "b", None, "b", "a"]):
        close(model(x), plain(x), 1e-12)
    lp.unload(model)
    assert classes(model) == types
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_merge_reproduces_the_adapted_weight_or_is_refused(kind: str, dtype: torch.dtype):
    model = build(COMPUTED[kind]).to(dtype)
    lp.apply(model, lp.LoRA(r=2, targets=["special", "up"]))
    perturb(model).eval()
    before, x = bits(model), torch.randn(5, 4, dtype=dtype)
    adapted = model(x)
    if kind in MERGED:
        lp.merge(model)
        close(model(x), adapted, 8 * torch.finfo(dtype).eps)
        lp.unmerge(model)
    else:
        with pytest.raises(lp.MergeError, match=r"special.weight is computed from .* cannot be written back .* remove"):
            lp.merge(model)
        assert_same_bits(bits(model), before)
        assert lp.merge(model, partial=True)[0].startswith("special.weight is computed")
        close(model(x), adapted, 8 * torch.finfo(dtype).eps)
        lp.unmerge(model)
    assert_same_bits(bits(model), before)
    assert torch.equal(model(x), adapted)


def test_a_merge_goes_through_every_right_inverse():
    model = build(lambda layer: parametrizations.weight_norm(layer)).double()
    with torch.no_grad():
        model.special.weight = torch.rand(8, 8, dtype=torch.float64)
    parametrize.register_parametrization(model.special, "weight", Positive())
    lp.apply(model, lp.IA3(targets=["special"], feedforward_targets=(), adapter_dtype="float64"))
    perturb(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    adapted, before = model(x), bits(model)
    close(lp.unload(copy.deepcopy(model), merge=True)(x), adapted, 1e-12)
    lp.merge(model)
    close(model(x), adapted, 1e-12)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)


def test_a_parameter_that_another_layer_shares_is_not_merged_into():
    model = build(parametrizations.weight_norm)
    model.second.parametrizations.weight.original1 = model.special.parametrizations.weight.original1
    lp.apply(model, lp.LoRA(r=2, targets="special"))
    with pytest.raises(lp.MergeError, match=r"special.weight is computed from .*original1, which is the same"):
        lp.merge(model)


class Learner(pl.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = build(COMPUTED[kind])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - 1).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "old spectral norm"])
def test_a_checkpoint_holds_the_adapters_only(kind: str, tmp_path: Path):
    module, x = Learner(kind), torch.randn(6, 4)
    before, options = bits(module), {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    method = lp.LoRA(r=2, targets=["special", "second"])
    trainer = pl.Trainer(max_epochs=1, callbacks=[method], enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader([x] * 3, batch_size=None))
    after = bits(module)
    assert_same_bits({key: after[key] for key in before}, before)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(".adapters." in key for key in state)
    loaded = lp.load_from_checkpoint(Learner, tmp_path / "a.ckpt", kind=kind)
    assert torch.equal(loaded.eval().net(x), module.eval().net(x))


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "old weight norm"])
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_compiled_without_a_break(kind: str, method: str):
    torch._dynamo.reset()
    model = build(COMPUTED[kind])
    lp.apply(model, METHODS[method](targets=["special", "second"]))
    perturb(model)
    x = torch.randn(3, 4)
    close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_the_spectral_norm_of_a_layer_that_trains_follows_it():
    model = build(parametrizations.spectral_norm)
    lp.apply(model, lp.LoRA(r=2, targets="special", trainable=["second"]))
    before = bits(model)
    for _ in range(3):
        model(torch.randn(3, 4))
    moved = {key for key, value in bits(model).items() if not torch.equal(value, before[key])}
    assert moved == {f"second.parametrizations.weight.0.{n}" for n in ("_u", "_v")}


def test_the_hook_can_be_removed_under_the_adapter():
    model = build(nn.utils.weight_norm)
    lp.apply(model, lp.LoRA(r=2, targets="special"))
    perturb(model)
    x = torch.randn(3, 4)
    adapted = model(x)
    nn.utils.remove_weight_norm(model.special)
    close(model(x), adapted)
    lp.merge(model)
    close(model(x), adapted)


@pytest.mark.parametrize("kind", ["weight norm", "spectral norm", "orthogonal", "own"])
@pytest.mark.parametrize("leave", [True, False])
def test_a_parametrization_under_adapters_cannot_be_removed(kind: str, leave: bool):
    model, x = build(COMPUTED[kind]), torch.randn(3, 4)
    lp.apply(model, lp.LoRA(r=2, targets="special"))
    perturb(model)
    before, y = bits(model), model(x)
    with pytest.raises(ValueError, match="sequence of tensors" if "weight" in kind and not leave else "lp.unload"):
        parametrize.remove_parametrizations(model.special, "weight", leave_parametrized=leave)
    assert_same_bits(bits(model), before)
    assert torch.equal(model(x), y)
    lp.unload(model)
    parametrize.remove_parametrizations(model.special, "weight")
    lp.apply(model, lp.LoRA(r=2, targets="special"))


def test_a_parametrization_over_adapters_is_removed_before_unload():
    model = build(lambda layer: layer).eval()
    x, plain = torch.randn(3, 4), copy.deepcopy(model)
    lp.apply(model, lp.LoRA(r=2, targets="special"))
    parametrizations.weight_norm(model.special)
    for remove in (lp.unload, lambda m: lp.delete_adapter(m, "default")):
        with pytest.raises(ValueError, match="'special' has a parametrization that was registered after its adapters"):
            remove(model)
    parametrize.remove_parametrizations(model.special, "weight")
    lp.unload(model)
    close(model(x), plain(x))
