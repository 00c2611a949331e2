"""A run with ``CacheFrozen`` equals one without it, bit for bit, and computes the frozen part once for each row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import lightning_peft as lp
from lightning_peft.core.class_swap import has_mixin
from lightning_peft.trainer.frozen_cache.replay import Replayed
from tests.methods.fitting import fitted

ROWS = 20
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


class Model(L.LightningModule):
    """A base and a head; ``seen`` counts the rows that the base's first layer has computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, 3)
        self.base = self.build().eval()
        self.seen: Counter[str] = Counter()

    def build(self) -> nn.Module:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.features(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def count(self, module: nn.Module) -> None:
        def before(module: nn.Module, args: Any) -> None:
            self.seen["train" if self.training else "validate"] += len(args[0])

        module.register_forward_pre_hook(before)

    @staticmethod
    def data() -> Dataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(ROWS, 16, generator=generator), torch.arange(ROWS) % 3)


class Residual(Model):
    """Frozen layers with operations between them, a separate position embedding, and one output that numpy reads."""

    def build(self) -> nn.Module:
        base = nn.Module()
        base.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        base.positions = nn.Parameter(torch.randn(16))
        self.count(base.layers[0][1])
        return base

    def features(self, x: Tensor) -> Tensor:
        first = self.base.layers[0](x)
        scale = float(first.detach().numpy().std(-1).mean())
        second = self.base.layers[1](first + self.base.positions)
        return scale * self.base.layers[2](second) + 0.5 * first


class Bert(Model):
    def build(self) -> nn.Module:
        model = BertModel(BertConfig(**SIZES, vocab_size=50), add_pooling_layer=False)
        self.count(model.encoder.layer[0].attention.self.query)
        return model

    def features(self, x: Tensor) -> Tensor:
        return self.base(input_ids=x, attention_mask=(x > 3).long()).last_hidden_state[:, 0]

    @staticmethod
    def data() -> Dataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randint(0, 50, (ROWS, 7), generator=generator), torch.arange(ROWS) % 3)


class Llama(Bert):
    def build(self) -> nn.Module:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50, use_cache=False))
        self.count(model.model.layers[0].self_attn.q_proj)
        return model

    def loss(self, batch: Any) -> Tensor:
        return self.base(input_ids=batch[0], labels=batch[0]).loss


class ViT(Model):
    def build(self) -> nn.Module:
        model = ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4), add_pooling_layer=False)
        self.count(next(m for m in model.modules() if isinstance(m, nn.Linear)))
        return model

    def features(self, x: Tensor) -> Tensor:
        return self.base(pixel_values=x).last_hidden_state[:, 0]

    @staticmethod
    def data() -> Dataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(ROWS, 3, 8, 8, generator=generator), torch.arange(ROWS) % 3)


def fit(
    model: Model, method: L.Callback, *callbacks: L.Callback, epochs: int = 3, data: Dataset | None = None
) -> dict[str, Tensor]:
    """Train, and return what has trained and the last validation loss."""
    data = data or model.data()
    train = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    trainer = fitted(model, [method, *callbacks], epochs, train, DataLoader(data, 10))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {**trained, "val": trainer.callback_metrics["val"]}


LAST = r"re:.*(layer|layers)\.2\..*"
CASES = {
    "numpy-probe": (Residual, lambda: lp.LinearProbe()),
    "residual-lora": (Residual, lambda: lp.LoRA(r=2, targets=["base.layers.2.0"], trainable=["head"])),
    "bert-probe": (Bert, lambda: lp.LinearProbe()),
    "bert-lora": (Bert, lambda: lp.LoRA(r=2, targets=[LAST + "(query|value)"], dropout=0.1, trainable=["head"])),
    "bert-bitfit": (Bert, lambda: lp.BitFit(targets=[LAST], trainable=["head"])),
    "bert-bottleneck": (
        Bert,
        lambda: lp.BottleneckAdapter(bottleneck_size=2, targets=[LAST + r"output"], trainable=["head"]),
    ),
    "llama-dora": (Llama, lambda: lp.DoRA(r=2, targets=[LAST + "(q_proj|v_proj)"])),
    "llama-ia3": (Llama, lambda: lp.IA3(targets=[LAST + "(k_proj|v_proj)"])),
    "vit-last": (ViT, lambda: lp.LastLayers(1)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_and_the_frozen_part_runs_once(case: str, tmp_path: Path):
    cls, method = CASES[case]
    plain, model = fit(cls(), method()), cls()
    cached = fit(model, method(), lp.CacheFrozen(tmp_path))
    assert cached.keys() == plain.keys()
    assert not [name for name in plain if not torch.equal(plain[name], cached[name])]
    # The first batch of the run is watched and not stored, and each epoch runs one batch again to compare it.
    assert model.seen["train"] == ROWS + 2 * 8  # in each epoch but the first, one batch runs again and is compared
    assert not any(has_mixin(module, Replayed) for module in model.modules())
    again = cls()
    assert torch.equal(fit(again, method(), lp.CacheFrozen(tmp_path))["val"], plain["val"])
    assert again.seen["train"] == 8 + 3 * 8  # the first batch of the run, and one of each epoch to compare


def test_layers_that_a_method_unfreezes_later_are_no_longer_skipped(tmp_path: Path):
    def method() -> lp.GradualUnfreezing:
        return lp.GradualUnfreezing(schedule=[1, 2])

    plain = fit(Bert(), method())
    cached = fit(Bert(), method(), lp.CacheFrozen(tmp_path))
    assert not [name for name in plain if not torch.equal(plain[name], cached[name])]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Refused(Residual):
    def __init__(self, change: str) -> None:
        self.change = change
        super().__init__()

    def build(self) -> nn.Module:
        base = super().build()
        if self.change == "dropout":
            base.layers[1].append(nn.Dropout(0.1))
        if self.change == "counter":
            base.layers[1].append(Counting())
        return base

    def features(self, x: Tensor) -> Tensor:
        self.base.train()
        if self.change == "noise":
            x = x + torch.randn(1)
        if self.change == "neighbours":
            return self.base.layers[0](x - x.mean(0))
        return super().features(x)


class Noisy(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn(()), y


REASONS = {
    "dropout": r"'base.layers.1' draws random numbers \(2 p=0.1\)",
    "noise": "code outside of frozen modules draws random numbers",
    "counter": "'base.layers.1' changes its own buffers",
    "neighbours": "depend on the other rows of the batch",
}


@pytest.mark.parametrize("change", REASONS)
def test_what_is_not_the_same_in_each_epoch_is_refused(change: str, tmp_path: Path):
    method = lp.LoRA(r=2, targets=["base.layers.2.0"], trainable=["head"])
    with pytest.raises(MisconfigurationException, match=REASONS[change]):
        fit(Refused(change), method, lp.CacheFrozen(tmp_path))


class Compile(L.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.base.layers[0].compile()


def test_other_refusals(tmp_path: Path):
    everywhere = lp.LoRA(r=2, targets="all-linear", trainable=["head"])
    with pytest.raises(
        MisconfigurationException, match="something that trains runs before the first frozen module ends"
    ):
        fit(Residual(), everywhere, lp.CacheFrozen(tmp_path))
    with pytest.raises(MisconfigurationException, match="the first entry of the training data differs each time"):
        fit(Residual(), lp.LinearProbe(), lp.CacheFrozen(tmp_path), data=Noisy(*Residual.data().tensors))
    with pytest.raises(MisconfigurationException, match=r"GB for 20 rows in .*, more than max_gb=1e-09"):
        fit(Residual(), lp.LinearProbe(), lp.CacheFrozen(tmp_path, max_gb=1e-9))
    with pytest.raises(MisconfigurationException, match=r"compiled modules cannot be skipped: base.layers.0"):
        fit(Residual(), lp.LinearProbe(), Compile(), lp.CacheFrozen(tmp_path))
    with pytest.raises(ValueError, match="max_gb must be positive or None, got 0"):
        lp.CacheFrozen(max_gb=0)


def test_a_changed_file_is_noticed(tmp_path: Path):
    fit(Bert(), lp.LinearProbe(), lp.CacheFrozen(tmp_path), epochs=1)
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-100:-90] = bytes(10)
        path.write_bytes(data)
    with pytest.raises(OSError, match="has changed since it was written"):
        fit(Bert(), lp.LinearProbe(), lp.CacheFrozen(tmp_path), epochs=1)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="is damaged .* its rows are computed again"):
        fit(Bert(), lp.LinearProbe(), lp.CacheFrozen(tmp_path), epochs=1)


def test_another_base_has_other_activations(tmp_path: Path):
    fit(Bert(), lp.LinearProbe(), lp.CacheFrozen(tmp_path), epochs=1)
    model = Bert()
    with torch.no_grad():
        model.base.embeddings.word_embeddings.weight[1, 1] += 1
    fit(model, lp.LinearProbe(), lp.CacheFrozen(tmp_path), epochs=1)
    assert model.seen["train"] == ROWS
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_fit_of_one_callback_reads_the_rows_of_its_validation(tmp_path: Path) -> None:
    class Alternates(Residual):
        """A validation that calls the base twice, so that rows of a batch cannot be matched with its calls."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            super().validation_step(batch, batch_idx)

    cache = lp.CacheFrozen(tmp_path)
    loaders = DataLoader(Residual.data(), 5), DataLoader(Residual.data(), 5)
    fitted(Alternates(), [lp.LinearProbe(), cache], 2, *loaders)
    assert cache._plain_validation  # this fit ran its validation in full
    model = Residual()
    fitted(model, [lp.LinearProbe(), cache], 3, *loaders)
    assert not cache._plain_validation
    assert model.seen["validate"] < 3 * ROWS
