"""Tiny models of every attention kind, random but seeded, in eval mode."""

from __future__ import annotations

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def llama(dtype=torch.float32, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype=torch.float32, head="LMHead"):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        pad_token_id=0,
        num_labels=3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return getattr(transformers, f"GPT2{head}Model" if head == "LMHead" else f"GPT2For{head}")(config).to(dtype).eval()


def bert(dtype=torch.float32, head="SequenceClassification"):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=3,
    )
    return getattr(transformers, f"BertFor{head}")(config).to(dtype).eval()


def t5(dtype=torch.float32):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).to(dtype).eval()


def vit(dtype=torch.float32):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=3,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).to(dtype).eval()


class Attention(nn.Module):
    """Hand-written causal attention with a fused projection."""

    def __init__(self, width: int = 16, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width: int = 16, causal: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, causal=causal)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class ViT(nn.Module):
    """A patch-token model that is not from Hugging Face: CLS, position table, blocks over (N, L, D)."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x)[:, 0])


class Classifier(L.LightningModule):
    """A LightningModule around blocks that a user might have written."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Sequential(*(Block() for _ in range(3))) if body is None else body
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).mean(1))

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self):
        g = torch.Generator().manual_seed(0)
        ids, labels = torch.randint(0, 20, (24, 6), generator=g), torch.randint(0, 3, (24,), generator=g)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, labels), batch_size=8)


def trainer(tmp_path, *callbacks, epochs=1, **options):
    return L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def randomise(model: nn.Module, std: float = 1.0) -> None:
    """Move every adapter parameter away from its start."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in f".{name}":
                p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * std)


def naive_attention(q, k, v, mask=None):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores + mask).softmax(-1) @ v
