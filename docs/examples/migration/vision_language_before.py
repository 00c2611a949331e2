import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration


class VisionLanguage(L.LightningModule):
    def __init__(self, name: str, lr: float = 1e-3):
        super().__init__()
        model = LlavaForConditionalGeneration.from_pretrained(name)
        lora = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=r".*language_model.*\.(q_proj|v_proj)",
            modules_to_save=["multi_modal_projector"],
        )
        self.model = get_peft_model(model, lora)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr)


def train(module, data, **options):
    trainer = L.Trainer(**options)
    trainer.fit(module, data)
    module.model.save_pretrained("adapter")
