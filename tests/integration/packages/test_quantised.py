"""Methods on bases that other packages quantised: results equal those on a float base with the dequantised weights, and
those of PEFT.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

import lightning_peft as lp
from lightning_peft.core.targeting.packed import dequantized, is_packed
from lightning_peft.trainer.quantised_strategies import adapt_quantised, packed_digests
from tests.helpers import close, perturb

bnb = pytest.importorskip("bitsandbytes")

QUANTISED = (0, 2, 4)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64, bias=False), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4)
    return nn.Sequential(*layers)


def four_bit(layer: nn.Linear) -> nn.Module:
    return bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )


def eight_bit(layer: nn.Linear) -> nn.Module:
    bias = layer.bias is not None
    return bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)


KINDS = {"nf4": four_bit, "int8": eight_bit}


def quantised(kind: str) -> nn.Sequential:
    model = mlp()
    for i in QUANTISED:
        layer = KINDS[kind](model[i])
        layer.load_state_dict(model[i].state_dict())
        model[i] = layer.to("cpu")  # quantises
    return model


def dequantised(model: nn.Sequential) -> nn.Sequential:
    plain = mlp()
    for i in QUANTISED:
        plain[i].weight.data = dequantized(model[i])
    return plain


def step(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    y = model(x)
    y.square().sum().backward()
    return y, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_first_does_not_stop_the_gradient(training):
    """On some CPUs bitsandbytes repacks a weight in evaluation mode for a kernel without a backward."""
    model, x = quantised("nf4"), torch.randn(5, 64)
    plain = dequantised(model)
    for each in (model, plain):
        lp.apply(each, lp.LoRA(r=2))
        perturb(each)
        each.eval()(x)
        each.train(training)
    (y, gradients), (expected, others) = step(model, x), step(plain, x)
    close(y, expected)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        close(gradient, others[name])


def test_layers_that_are_not_quantised_yet_are_refused():
    model = mlp()
    model[0] = four_bit(model[0])
    with pytest.raises(
        lp.TargetError, match=r"'0' is a bitsandbytes\S*Params4bit, .* failed in a trial call \(AssertionError"
    ):
        lp.apply(model, lp.LoRA(r=2, targets=["0"]))


@pytest.mark.parametrize("kind", KINDS)
def test_as_peft_has_it(kind, tmp_path):
    peft = pytest.importorskip("peft")
    x = torch.randn(5, 64)
    model = quantised(kind)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"])
    )
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    lp.load_adapter(model, tmp_path / "theirs", trainable=True)
    (y, gradients), (expected, others) = step(model, x), step(theirs, x)
    close(y, expected)
    ours = sorted(p.float().norm().item() for p in gradients.values())
    close(torch.tensor(ours), torch.tensor(sorted(p.float().norm().item() for p in others.values())), 1e-4)
    lp.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(quantised(kind), tmp_path / "ours")
    close(again.train()(x), expected)  # in evaluation mode bitsandbytes rounds more


class Regression(L.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = quantised(kind)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return self(batch).square().mean()

    def validation_step(self, batch, index):
        self.log("val", self(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, folder: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    data = DataLoader(torch.randn(12, 64, generator=torch.Generator().manual_seed(1)), 4)
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
    saving = L.pytorch.callbacks.ModelCheckpoint(folder, filename="last")
    trainer = L.Trainer(callbacks=[*callbacks, saving], enable_model_summary=False, **options)
    trainer.fit(module, data, data)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_checkpoint(kind, tmp_path):
    module = Regression(kind)
    before = {k: v.clone() for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)}
    fit(module, tmp_path, lp.LoRA(r=2))
    now = module.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {k.split(".")[2] for k in state} == {"adapters"}
    x = torch.randn(3, 64)
    again = lp.load_from_checkpoint(Regression, tmp_path / "last.ckpt")
    close(again.eval()(x), module.eval()(x), 1e-6)
    assert sum(map(is_packed, again.modules())) == 3


class Floats(L.LightningModule):
    """A module with a float base, which a callback quantises."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    forward = Regression.forward
    training_step = Regression.training_step
    validation_step = Regression.validation_step
    configure_optimizers = Regression.configure_optimizers


BASES = {
    "nf4": lambda: lp.QuantizeBase("nf4"),
    "fp4": lambda: lp.QuantizeBase("fp4", options={"compress_statistics": False}),
    "int8": lambda: lp.QuantizeBase("int8"),
    "torchao int8": lambda: lp.QuantizeBase("int8", backend="torchao"),
    "torchao int4": lambda: lp.QuantizeBase("int4", options={"group_size": 16}),
    "torchao float8": lambda: lp.QuantizeBase("float8"),
}


def base(name: str) -> lp.QuantizeBase:
    made = BASES[name]()
    if "torchao" in name:
        pytest.importorskip("torchao")
    return made


@pytest.mark.parametrize("name", BASES)
def test_quantize_base(name, tmp_path):
    module, x = Floats(), torch.randn(3, 64)
    exact, layer = module(x).detach(), module.net[0]
    fit(module, tmp_path, base(name), lp.LoRA(r=2))
    assert [i for i, m in enumerate(module.net) if is_packed(m)] == [0, 2, 4]
    assert module.net[0] is layer
    error = (Floats()(x) - lp.unload(copy.deepcopy(module)).train()(x)).abs().max() / exact.abs().max()
    assert 0 < error < 0.2
    again = lp.load_from_checkpoint(Floats, tmp_path / "last.ckpt")
    assert torch.equal(again.eval()(x), module.eval()(x))
    fit(Floats(), tmp_path, base(name), lp.LoRA(r=2), max_epochs=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[lp.LoRA(r=2)], enable_progress_bar=False)
    with pytest.raises(
        lp.StateError, match=r"no quantised layers, .* same way first: lp.apply\(model, lp.QuantizeBase\("
    ):
        trainer.validate(Floats(), DataLoader(torch.randn(4, 64)), ckpt_path=tmp_path / "last.ckpt")
    lp.save_adapter(module, tmp_path / "adapter")
    with pytest.raises(lp.StateError, match=r"lp.QuantizeBase\("):
        lp.load_adapter(Floats(), tmp_path / "adapter")
    other = Floats()
    report = lp.apply(other, base(name))
    assert "QuantizeBase: 3 layers quantised to" in report.notes[0]
    lp.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.eval()(x), module(x))


def test_quantize_base_is_planned_and_undone():
    model = mlp()
    before = [*model.named_parameters()]
    report = lp.inspect(model, lp.QuantizeBase("nf4"), lp.LoRA(r=2))
    assert "QuantizeBase: 3 layers would be quantised to nf4 (now 32,768 bytes)" in report.notes
    with pytest.raises(lp.TargetError, match="no_such"):
        lp.apply(model, lp.QuantizeBase("nf4"), lp.LoRA(targets=["no_such"]))
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, model.named_parameters(), strict=True))
    assert not any(map(is_packed, model))
    lp.apply(model, lp.QuantizeBase("nf4"), lp.LoRA(r=2))
    lp.apply(model, lp.QuantizeBase("nf4"), lp.LoRA(r=2))
    with pytest.raises(ValueError, match="already prepared by a QuantizeBase with other arguments"):
        lp.apply(model, lp.QuantizeBase("fp4"))
    adapted = mlp()
    lp.apply(adapted, lp.LoRA(r=2))
    with pytest.raises(ValueError, match="methods were already applied"):
        lp.apply(adapted, lp.QuantizeBase("nf4"))
    with pytest.raises(lp.TargetError, match=r"'1' is not a plain nn.Linear \(Conv1d\)"):
        lp.apply(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1)), lp.QuantizeBase("nf4", targets=["1"]))


def test_arguments_that_no_backend_has():
    with pytest.raises(ValueError, match="backend='torchao' does not have kind='nf4'; bitsandbytes do"):
        lp.QuantizeBase("nf4", backend="torchao")
    with pytest.raises(ValueError, match="bitsandbytes has no option 'group_size' for kind='nf4'"):
        lp.QuantizeBase("nf4", options={"group_size": 4})


class BuiltLate(Floats):
    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        self.net = self.__dict__.get("_modules", {}).get("net") or mlp()


def bf16(module: L.LightningModule) -> L.LightningModule:
    return module.to(torch.bfloat16)


@pytest.mark.parametrize("ignored", [None, {"net.0", "net.5"}])
@pytest.mark.parametrize("make", [Floats, BuiltLate])
@pytest.mark.parametrize("method", [lambda: lp.LoRA(r=2), lambda: lp.GatedLoRA(r=2)], ids=["LoRA", "GatedLoRA"])
def test_precision_of_lightning(make, ignored, method, tmp_path, monkeypatch):
    """Lightning refuses this plugin without a GPU, but the layers of bitsandbytes work there."""
    connector = L.pytorch.trainer.connectors.accelerator_connector._AcceleratorConnector
    monkeypatch.setattr(connector, "_validate_precision_choice", lambda self: None)
    plugin = L.pytorch.plugins.BitsandbytesPrecision("nf4", dtype=torch.bfloat16, ignore_modules=ignored)
    module = bf16(make())
    if make is BuiltLate and ignored:
        with pytest.raises(RuntimeError, match="not supported when used with"):
            fit(module, tmp_path, method(), plugins=[plugin])
        return
    fit(module, tmp_path, method(), plugins=[plugin])
    quantised = {0, 2, 4, 5} if ignored is None else {2, 4}
    assert {i for i, m in enumerate(module.net) if is_packed(m)} == quantised
    assert {i for i, m in enumerate(module.net) if hasattr(m, "adapters")} == {0, 2, 4}
    before = module.net[2].weight.clone()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    module.load_state_dict(state)
    assert torch.equal(module.net[2].weight, before)


def test_the_merge_command_quantises_the_base_and_dequantises(tmp_path):
    from lightning_peft.cli.merge import merge
    from lightning_peft.core.injection.merge import MergeError

    module, x = Floats(), torch.randn(3, 64)
    fit(module, tmp_path, lp.QuantizeBase("nf4"), lp.LoRA(r=2))
    lp.save_adapter(module, tmp_path / "adapter")
    name = f"{__name__}.Floats"
    for source in (tmp_path / "last.ckpt", tmp_path / "adapter"):
        with pytest.raises(MergeError, match="has a quantised weight"):
            merge([str(source), str(tmp_path / "out.pt"), "--model", name])
        out = tmp_path / f"{source.name}.pt"
        merge([str(source), str(out), "--model", name, "--dequantize"])
        plain = Floats()
        plain.load_state_dict(torch.load(out, weights_only=True))
        close(plain(x), module(x), 1e-4)


@pytest.mark.parametrize("name", BASES)
def test_merge_dequantizes_and_unmerge_restores(name):
    model, x = mlp(), torch.randn(3, 64)
    lp.apply(model, base(name), lp.LoRA(r=2))
    perturb(model)
    expected, kind = model(x), type(model[0])
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    lp.merge(model, dequantize=True)
    assert not any(map(is_packed, model))
    close(model(x), expected, 1e-4)
    lp.unmerge(model)
    assert type(model[0]) is kind
    assert torch.equal(model(x), expected)
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items() if type(v) is torch.Tensor)
    lp.unload(model, merge=True, dequantize=True)
    close(model(x), expected, 1e-4)
    lp.apply(model, base(name), lp.LoRA(r=2))  # the plain model can be quantised again
    assert is_packed(model[0])


@pytest.mark.parametrize("name", ["nf4", "torchao int8", "torchao float8"])
def test_ddp_leaves_the_quantised_tensors_alone(name, tmp_path):
    module = Floats()
    fit(module, tmp_path, base(name), lp.LoRA(r=2), strategy="ddp", devices=1)
    assert {"net.0.weight", "net.2.weight", "net.4.weight"} <= {*module._ddp_params_and_buffers_to_ignore}
    again = lp.load_from_checkpoint(Floats, tmp_path / "last.ckpt")
    x = torch.randn(3, 64)
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_ranks_must_hold_the_same_quantised_weights():
    one, other = (packed_digests(quantised("nf4")) for _ in range(2))
    assert one == other
    assert one.keys() == {"0.weight", "2.weight", "4.weight", "0.bias", "4.bias"}
    changed = quantised("nf4")
    changed[2].weight.data[0] ^= 1
    assert packed_digests(changed) != one


def test_strategies_that_cannot_have_a_quantised_base_are_refused():
    model = mlp()
    strategy = L.pytorch.strategies.DDPStrategy(start_method="spawn", cluster_environment=LightningEnvironment())
    lp.apply(model, base("nf4"))
    strategy._configure_launcher()
    with pytest.raises(MisconfigurationException, match="QuantizeBase is not supported with a strategy that spawns"):
        adapt_quantised(model, strategy)
    with pytest.raises(MisconfigurationException, match=r"'0' \(Linear4bit\) .* which FSDPStrategy cannot shard"):
        adapt_quantised(quantised("nf4"), L.pytorch.strategies.FSDPStrategy())
