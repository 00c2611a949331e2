import lightning as L
import torch
from transformers import AutoModelForAudioClassification

import lightning_peft as lp


class AudioClassifier(L.LightningModule):
    def __init__(self, name: str, lr: float = 1e-3):
        super().__init__()
        self.model = AutoModelForAudioClassification.from_pretrained(name)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def train(module, data, **options):
    lora = lp.LoRA(r=8, alpha=16, targets=["q_proj", "v_proj"], trainable=["projector", "classifier"])
    trainer = L.Trainer(callbacks=[lora], **options)
    trainer.fit(module, data)
    lp.save_adapter(module, "adapter")
