"""Every check reports the mistake it is for, and correct but unusual runs cause no report."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.trainer import lifecycle

from .toys import Toy, data, loader, lora, trainer, val_loader


def fit(root: Path, module: L.LightningModule, method: Any = None, **options: Any) -> list[str]:
    """Train for a few steps; return the audit's warnings."""
    L.seed_everything(1, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(
            root, method=method, enable_checkpointing=False, max_epochs=options.pop("max_epochs", 3), **options
        )
        run.fit(module, loader(), val_loader())
    return [str(w.message) for w in caught if "adapters" in str(w.message) or "gradient" in str(w.message)]


def bottleneck(**options: Any) -> lp.BottleneckAdapter:
    return lp.BottleneckAdapter(bottleneck_size=2, targets=["body.0"], trainable=["head"], **options)


def pretrained(module: Toy) -> Toy:
    for layer in (module.body[0], module.body[4]):
        nn.init.normal_(layer.weight, std=0.05)
        layer.weight.data.mul_(torch.rand_like(layer.weight) ** 2)
    return module


def test_a_fresh_head_on_a_pretrained_base(tmp_path: Path) -> None:
    module = pretrained(Toy(width=64))
    with pytest.raises(lp.AuditError, match=r"output head 'head' is frozen.*trainable=\['head'\]"):
        fit(tmp_path, module, lora(trainable=[]))
    assert fit(tmp_path, pretrained(Toy(width=64)), lora()) == []
    assert fit(tmp_path, Toy(width=64), lora(trainable=[])) == []  # every layer is random, so nothing looks pretrained
    trained = pretrained(Toy(width=64))
    trained.head.weight.data.mul_(3 * torch.rand_like(trained.head.weight))
    assert fit(tmp_path, trained, lora(trainable=[])) == []


def test_a_head_of_zeros_is_fresh(tmp_path: Path) -> None:
    module = pretrained(Toy(width=64))
    nn.init.zeros_(module.head.weight)
    with pytest.raises(lp.AuditError, match=r"output head 'head' is frozen.*trainable=\['head'\]"):
        fit(tmp_path, module, lora(trainable=[]))
    module = Toy(width=16)
    nn.init.zeros_(module.head.weight)
    assert fit(tmp_path, module, lora()) == []


class Absent(Toy):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class Twice(Toy):
    def configure_optimizers(self) -> Any:
        adapters = [p for n, p in self.named_parameters() if "adapters" in n]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = torch.optim.SGD([{"params": adapters}, {"params": self.head.parameters()}], lr=0.1)
        optimizer.param_groups[1]["params"].append(adapters[0])
        return optimizer


def test_optimizers(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"body.\{0,4\}.adapters.default.lora_A.*no optimizer holds them"):
        fit(tmp_path, Absent())
    with pytest.raises(lp.AuditError, match=r"body.0.adapters.default.lora_A are in more than one"):
        fit(tmp_path, Twice())
    assert len(fit(tmp_path, Absent(), lora(audit="warn"))) >= 1
    assert fit(tmp_path, Absent(), lora(audit="off")) == []


class Unused(Toy):
    def build(self) -> None:
        self.extra = nn.Linear(16, 16)
        super().build()


class Bypassed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body[1](nn.functional.linear(x, self.body[0].weight, self.body[0].bias)))
        return self.head(torch.relu(self.body[4](x)))


class Detached(Toy):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body[:3](x)
        return self.head(self.body[3:](x))


class Reentrant(Toy):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.body[:5], x, use_reentrant=True)
        return self.head(hidden)


class NotFinite(Toy):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) * float("inf")


class EvalBypassed(Toy):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else Bypassed.forward(self, x)


def test_gradients(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"extra.adapters.default.lora_A.* got no gradient.*not called"):
        fit(tmp_path, Unused())
    with pytest.raises(lp.AuditError, match=r"extra.adapters.default.lora_A.* in the first step"):
        fit(tmp_path, Unused(), max_steps=1)
    with pytest.raises(lp.AuditError, match=r"adapters of body.0 did not run in training"):
        fit(tmp_path, Bypassed(), bottleneck(), max_steps=1, num_sanity_val_steps=0)
    assert (
        fit(tmp_path, Bypassed(), lora(dropout=0.0), max_steps=1, num_sanity_val_steps=0) == []
    )  # code that reads the weight gets the adapted one
    with pytest.raises(
        lp.AuditError, match=r"body.0.adapters.default.lora_A.*first step.*the loss does not depend on them"
    ):
        fit(tmp_path, Detached(), max_steps=1)
    with pytest.raises(lp.AuditError, match=r"body.\{0,4\}.adapters.default.lora_A.*use_reentrant=True"):
        fit(tmp_path, Reentrant(), max_steps=1)
    with pytest.raises(lp.AuditError, match=r"body.\{0,4\}.adapters.default.lora_A.* not finite in the first step"):
        fit(tmp_path, NotFinite(), max_steps=1)


class Collected(Toy):
    """Computes with weights that it does not read as attributes in its forward."""

    how = ""

    def build(self) -> None:
        super().build()
        self.weights = [self.body[0].weight]
        self.start = [self.body[0].weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        weight = {
            "list": lambda: self.weights[0],
            "named": lambda: dict(self.named_parameters())["body.0.weight"].detach(),
            "stored": lambda: torch.cat([self.body[0]._parameters["weight"]]),
        }[self.how]()
        return self.head(self.body[1:](x @ weight.t()))


class Regularised(Collected):
    """Uses stored weights without applying them to the batch."""

    def loss(self, batch: Any) -> Tensor:
        like = next(self.parameters())
        far = sum(((p - start) ** 2).mean() for p, start in zip(self.weights, self.start))
        decay = sum(p.pow(2).sum() for p in self.parameters())
        return super().loss([batch[0].to(like) + like.new_zeros(16), batch[1]]) + 1e-3 * (far + decay)

    forward = Toy.forward


@pytest.mark.parametrize("how", ["list", "named", "stored"])
def test_stored_weights(tmp_path: Path, how: str) -> None:
    module = Collected()
    module.how = how
    methods = [lp.LoRA(r=2, targets=["body.0"], trainable=["head"]), lp.DoRA(r=2, targets=["body.0", "body.4"])]
    for method in methods:
        with pytest.raises(
            lp.AuditError, match=r"adapters of 'body.0' have no effect in Collected.forward .*linear|mat"
        ):
            fit(tmp_path, copy.deepcopy(module), method, max_steps=1, num_sanity_val_steps=0)
    with pytest.raises(lp.AuditError, match=r"adapters of 'body.0' have no effect"):
        trainer(tmp_path, method=methods[0]).test(module, val_loader(), verbose=False)
    assert not torch.overrides._len_torch_function_stack()


def test_a_loop_without_a_trainer() -> None:
    module, x = Collected().eval(), torch.randn(4, 16)
    module.how = "list"
    lp.apply(module, lp.LoHa(r=2, targets=["body.0", "body.4"]))
    with pytest.raises(lp.AuditError, match=r"adapters of 'body.0' have no effect"), lp.audit(module):
        module(x)
    with lp.audit(module), lp.disabled(module):  # the stored weight of the base is intended here
        module(x)
    with lp.audit(module):
        Toy.forward(module, x)
    assert not torch.overrides._len_torch_function_stack()


def test_stored_weights_in_penalties(tmp_path: Path) -> None:
    assert fit(tmp_path, Regularised(), lora(), max_steps=2, num_sanity_val_steps=0) == []


def test_evaluation(tmp_path: Path) -> None:
    with pytest.raises(lp.AuditError, match=r"adapters of body.0 did not run in evaluation"):
        fit(tmp_path, EvalBypassed(), bottleneck())
    warned = fit(tmp_path, EvalBypassed(), bottleneck(audit="warn"), max_epochs=1)
    assert len(warned) == 1
    module, run = EvalBypassed(), trainer(tmp_path, method=bottleneck())
    with pytest.raises(lp.AuditError, match=r"did not run in evaluation"):
        run.test(module, val_loader(), verbose=False)
    assert not any("Watched" in c.__name__ for m in module.modules() for c in type(m).__mro__)


class Experts(Toy):
    """Routes each batch to a single expert."""

    def build(self) -> None:
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(40))
        super().build()

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x.abs().sum() * 1000) % 40]
        return super().forward(expert(x))


class OnlyInTraining(Toy):
    """Has an auxiliary branch that validation does not call."""

    def build(self) -> None:
        self.aux = nn.Linear(16, 2)
        super().build()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) + nn.functional.cross_entropy(self.aux(batch[0]), batch[1])


class EveryOtherStep(OnlyInTraining):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) if index % 2 else Toy.training_step(self, batch, index)


class PartlyValidated(Toy):
    def validation_step(self, batch: Any, index: int) -> None:
        self.body[0](batch[0])


def test_no_false_alarms(tmp_path: Path) -> None:
    routed = fit(tmp_path, Experts())
    assert len(routed) == 1
    assert "may be the routing" in routed[0]
    for module in (OnlyInTraining(), EveryOtherStep(), PartlyValidated(), Toy(), Toy("setup")):
        assert fit(tmp_path, module) == [], type(module).__name__
    assert fit(tmp_path, Toy(), precision="bf16-mixed") == []
    assert fit(tmp_path, Toy(), accumulate_grad_batches=4) == []


class TakingTurns(Toy):
    """Manual optimization with two optimizers, one of which steps later."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()[index % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        adapters = [p for n, p in self.named_parameters() if "adapters" in n]
        return torch.optim.SGD(adapters, lr=0.1), torch.optim.Adam(self.head.parameters(), lr=0.01)


def test_several_optimizers_raise_no_alarm(tmp_path: Path) -> None:
    assert fit(tmp_path, TakingTurns()) == []


class Encoder(Toy):
    """In eval mode, torch's encoder layer has a fast path that never calls its children."""

    def build(self) -> None:
        if not hasattr(self, "body"):
            torch.manual_seed(0)
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
            self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None])[:, 0])


def test_fast_path_of_the_transformer_encoder(tmp_path: Path) -> None:
    module = Encoder()
    assert fit(tmp_path, module, lora(targets=["linear1", "linear2"])) == []
    x = data(4)[0]
    with torch.inference_mode():
        adapted = module.eval()(x)
        with lp.disabled(module):
            assert not torch.allclose(module(x), adapted)


class Holder(Toy):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.filterwarnings("ignore:Attribute")
def test_modules_among_the_hyperparameters(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"hyperparameter 'part' is a Linear of 0.0404 MB.*ignore=\['part'\]"):
        trainer(tmp_path, max_steps=1).fit(Holder(nn.Linear(100, 100, bias=True).requires_grad_(False)), loader())


def test_an_untrained_body_is_not_taken_for_a_pretrained_one(tmp_path):
    module = Toy(width=64)
    for layer in (module.body[0], module.body[4]):
        torch.nn.init.xavier_uniform_(layer.weight)
    trainer(tmp_path, method=lp.LoRA(r=2, targets=["body.*"]), max_steps=1).fit(module)


def test_compilation_is_checked_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(lifecycle, "is_compiled", lambda model: asked.append(model) or True)
    trainer(tmp_path, max_epochs=1).fit(Toy(), loader())
    assert len(asked) == 1
