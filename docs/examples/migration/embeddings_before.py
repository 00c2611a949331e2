import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel


class Embedder(L.LightningModule):
    def __init__(self, name: str, lr: float = 1e-3):
        super().__init__()
        model = AutoModel.from_pretrained(name)
        lora = LoraConfig(task_type="FEATURE_EXTRACTION", r=8, lora_alpha=16, target_modules=["query", "value"])
        self.encoder = get_peft_model(model, lora)
        self.lr = lr

    def forward(self, tokens):
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def training_step(self, batch, batch_idx):
        scores = self(batch["query"]) @ self(batch["passage"]).T / 0.05
        return cross_entropy(scores, torch.arange(len(scores), device=self.device))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr)


def train(module, data, **options):
    trainer = L.Trainer(**options)
    trainer.fit(module, data)
    module.encoder.save_pretrained("adapter")
