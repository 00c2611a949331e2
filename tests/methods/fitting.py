"""A short training with checkpoint and resume, and small models, for the tests of activation methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as lp

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def encoder() -> nn.Module:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    return seeded(make)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return seeded(lambda: BertModel(BertConfig(**SMALL)))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return seeded(lambda: LlamaModel(LlamaConfig(**SMALL, num_key_value_heads=1)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return seeded(lambda: GPT2Model(config))


class Block(nn.Module):
    """A residual block of convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ConvNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.layer2 = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


TOKENS = torch.arange(12).view(2, 6) * 3
BATCHES = {bert: TOKENS, llama: TOKENS, gpt2: TOKENS, encoder: torch.linspace(-2, 2, 2 * 5 * 16).sin().view(2, 5, 16)}


def run(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def moved(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Change everything that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lp.trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
    return model


class Classifier(L.LightningModule):
    """An encoder and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.head = seeded(lambda: nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(
    model: L.LightningModule, callbacks: list[L.Callback], epochs: int, *data: DataLoader, ckpt_path: str | None = None
) -> L.Trainer:
    """Fit ``model`` on the CPU without writing files, and return the Trainer."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, *data, ckpt_path=ckpt_path)
    return trainer


def fit_and_resume(make: Callable[[], lp.PEFTMethod], folder: Any) -> None:
    """Train two epochs at once, and in two runs with a checkpoint between them; both must end bit for bit the same."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(8, 5, 16, generator=generator), torch.arange(8) % 2)

    def fit(epochs: int, ckpt_path: str | None = None) -> tuple[L.Trainer, Classifier]:
        L.seed_everything(0, verbose=False)
        model = Classifier()
        loaders = DataLoader(data, 4), DataLoader(data, 4)
        return fitted(model, [make()], epochs, *loaders, ckpt_path=ckpt_path), model

    _, whole = fit(2)
    trainer, half = fit(1)
    path = str(folder / "half.ckpt")
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["state_dict"].keys() == lp.adapter_state(half).keys()
    _, resumed = fit(2, path)
    expected, found = lp.adapter_state(whole), lp.adapter_state(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    loaded = lp.load_from_checkpoint(Classifier, path)
    assert torch.equal(loaded.eval()(data.tensors[0]), half.eval()(data.tensors[0]))
    fresh = {k: v for k, v in Classifier().state_dict().items() if not k.startswith("head")}
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in fresh.items())
