import lightning as L
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel

import lightning_peft as lp


class Embedder(L.LightningModule):
    def __init__(self, name: str, lr: float = 1e-3):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(name)
        self.lr = lr

    def forward(self, tokens):
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def training_step(self, batch, batch_idx):
        scores = self(batch["query"]) @ self(batch["passage"]).T / 0.05
        return cross_entropy(scores, torch.arange(len(scores), device=self.device))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def train(module, data, **options):
    lora = lp.LoRA(r=8, alpha=16, targets=["query", "value"])
    trainer = L.Trainer(callbacks=[lora], **options)
    trainer.fit(module, data)
    lp.save_adapter(module, "adapter")
