"""Modules whose ``configure_optimizers`` was written for the base alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts


class Net(L.LightningModule):
    """An embedding, a block with norm and head; trains on token ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.tokens(ids))
        return self.head(h + self.down(torch.relu(self.up(h))))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]).mean(1), batch[1])


class Sorted(Net):
    """Sorts parameters by class and name as minGPT does: each must be in one of two sets."""

    trainable_only = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decay, no_decay = set(), set()
        for module_name, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if self.trainable_only and not parameter.requires_grad:
                    continue
                full = f"{module_name}.{name}"
                if name == "bias" or (name == "weight" and isinstance(module, nn.LayerNorm | nn.Embedding)):
                    no_decay.add(full)
                elif name == "weight" and isinstance(module, nn.Linear):
                    decay.add(full)
        known = {n: p for n, p in self.named_parameters() if p.requires_grad or not self.trainable_only}
        assert not decay & no_decay
        assert known.keys() == decay | no_decay, f"not sorted: {known.keys() - decay - no_decay}"
        groups = [
            {"params": [known[n] for n in sorted(decay)], "weight_decay": 0.1},
            {"params": [known[n] for n in sorted(no_decay)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)


class SortedTrainable(Sorted):
    """Sorts trainable parameters by class and name, as uni2ts does."""

    trainable_only = True


class ByList(Net):
    """Lists the parameters it knows in named groups of two optimizers, without any assertion."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        linear = [(n, p) for n, p in self.named_parameters() if n.split(".")[-2] in ("up", "down", "head")]
        other = [(n, p) for n, p in self.named_parameters() if n.split(".")[-2] in ("tokens", "norm")]
        return torch.optim.AdamW(
            [{"params": linear, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=1e-2
        )


def fit(module: Net, root: Path, *methods: Any, **options: Any) -> torch.optim.Optimizer:
    ids = torch.randint(10, (8, 5), generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(ids, ids[:, 0] % 3), batch_size=4)
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    trainer = L.Trainer(default_root_dir=root, accelerator="cpu", callbacks=[*methods], **options)
    trainer.fit(module, data)
    return trainer.optimizers[0]


def groups_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    names = {id(p): n for n, p in module.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


METHODS = {
    "lora": [lp.LoRA(r=2, targets=["up", "tokens"], trainable=["head"])],
    "activation": [lp.BottleneckAdapter(bottleneck_size=2, targets=["down"])],
    "two": [lp.LoRA(r=2, targets=["up"]), lp.NormTuning(name="norms")],
    "lora plus": [lp.LoRA(r=2, targets=["up", "tokens"], trainable=["head"], lora_plus_ratio=4)],
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("cls", [Sorted, SortedTrainable, ByList])
def test_adapters_join_the_group_of_the_weight_they_adapt(cls: type[Net], case: str, tmp_path: Path):
    module = cls()
    optimizer = fit(module, tmp_path, *METHODS[case])
    decay = groups_by_name(module, optimizer)
    trainable = [n for n, p in module.named_parameters() if p.requires_grad]
    assert sorted(decay) == sorted(trainable)
    for name, value in decay.items():
        host = name.split(".")[0]
        of_bias = cls is not ByList and name.endswith("bias")  # a bottleneck's bias too, which this code can sort
        assert value == (0.0 if host in ("tokens", "norm") or of_bias else 0.1), name
    for group in optimizer.param_groups:
        assert len(group.get("param_names", group["params"])) == len(group["params"])


def test_training_equals_that_of_code_that_knows_adapters(tmp_path: Path):
    class Knows(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            by_decay: dict[float, list[nn.Parameter]] = {0.1: [], 0.0: []}
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    by_decay[0.0 if "tokens" in name or name.endswith("bias") else 0.1].append(parameter)
            return torch.optim.AdamW([{"params": p, "weight_decay": d} for d, p in by_decay.items()], lr=1e-2)

    states = []
    for cls in (Knows, Sorted, SortedTrainable):
        module = cls()
        fit(module, tmp_path, *METHODS["lora"])
        states.append(lp.adapter_state(module))
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])


def test_the_module_is_restored_and_its_base_is_frozen(tmp_path: Path):
    module = SortedTrainable()
    fit(module, tmp_path, lp.LoRA(r=2, targets=["up"]))
    assert [name for name, _ in hosts(module)] == ["up"]
    assert not module.up.weight.requires_grad
    lp.unload(module)


def test_an_unrelated_error_is_raised_unchanged(tmp_path: Path):
    class Wrong(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            raise KeyError(f"{len(list(self.parameters()))} parameters")

    module = Wrong()
    with pytest.raises(KeyError, match="11 parameters"):  # the parameters of the first call, with adapters
        fit(module, tmp_path, lp.LoRA(r=2, targets=["up"]))
    assert [name for name, _ in hosts(module)] == ["up"]
    assert not module.down.weight.requires_grad


def test_an_optimizer_that_trains_another_part_gets_no_adapters(tmp_path: Path):
    class HeadOnly(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match="would never be updated"):
        fit(HeadOnly(), tmp_path, lp.LoRA(r=2, targets=["up"], trainable=["head"]))


class TwoByHand(Net):
    """Manual optimization with two optimizers, with or without toggling; freezing may leave either empty."""

    def __init__(self, toggle: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            scheduler.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        body = [*self.tokens.parameters(), *self.norm.parameters(), *self.up.parameters(), *self.down.parameters()]
        optimizers = [torch.optim.Adam(body, lr=1e-2), torch.optim.SGD(self.head.parameters(), lr=1e-2)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1) for o in optimizers]


def half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))


def probe() -> lp.LinearProbe:
    return lp.LinearProbe(targets=["head"])


@pytest.mark.parametrize("plugins", [[], [half]], ids=["float32", "float16"])
def test_one_of_two_optimizers_may_be_left_empty(plugins: list[Any], tmp_path: Path):
    module = TwoByHand()
    before = module.head.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, tmp_path, probe(), plugins=[plugin() for plugin in plugins])
    assert not torch.equal(module.head.weight, before)
    said = [str(w.message) for w in caught if "optimizer" in str(w.message)]
    assert [text.partition(" (")[0] for text in said] == ["optimizer 0"]  # and no warning about the order of schedulers
    assert "(Adam) has nothing to train, since all its parameters are frozen: tokens.weight, norm.weight" in said[0]


def test_optimizers_that_are_all_left_empty(tmp_path: Path):
    class NormLess(TwoByHand):
        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(self.up.parameters()), torch.optim.SGD(self.head.parameters(), lr=1e-2)]

    said = r"nothing would train: optimizer 0 \(Adam\).*: up\.weight, up\.bias; optimizer 1 \(SGD\).*: head"
    with pytest.raises(MisconfigurationException, match=said):
        fit(NormLess(), tmp_path, lp.NormTuning())


def test_an_empty_optimizer_that_is_toggled(tmp_path: Path):
    with pytest.raises(lp.AuditError, match=r"head\.weight, head\.bias do not require gradients now.*skip the step of"):
        fit(TwoByHand(toggle=True), tmp_path, probe())


@pytest.mark.parametrize("plugins", [[], [half]], ids=["float32", "float16"])
def test_toggling_two_optimizers_that_both_train(plugins: list[Any], tmp_path: Path):
    fit(TwoByHand(toggle=True), tmp_path, *METHODS["lora"], plugins=[plugin() for plugin in plugins])


class Sometimes(Net):
    """Skips its first batch, and computes the loss of its last batch from frozen layers only."""

    cut = True

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        if batch_idx == 0:
            self(batch[0])
            return None
        inputs = self.tokens(batch[0]).requires_grad_()
        return inputs.sum() if self.cut else super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def test_a_scaler_without_gradients_in_automatic_optimization(tmp_path: Path):
    with pytest.raises(lp.AuditError, match=r"SGD has no gradient in this step, and the gradient scaler"):
        fit(Sometimes(), tmp_path, lp.LinearProbe(targets=["head"]), plugins=[half()])
    module = Sometimes()
    module.cut = False
    fit(module, tmp_path, *METHODS["lora"], plugins=[half()])
