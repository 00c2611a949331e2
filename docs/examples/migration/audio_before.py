import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForAudioClassification


class AudioClassifier(L.LightningModule):
    def __init__(self, name: str, lr: float = 1e-3):
        super().__init__()
        model = AutoModelForAudioClassification.from_pretrained(name)
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["projector", "classifier"],
        )
        self.model = get_peft_model(model, lora)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        trained = filter(lambda p: p.requires_grad, self.parameters())
        return torch.optim.AdamW(trained, lr=self.lr)


def train(module, data, **options):
    trainer = L.Trainer(**options)
    trainer.fit(module, data)
    module.model.save_pretrained("adapter")
