import lightning as L
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM


class LanguageModel(L.LightningModule):
    def __init__(self, name: str, r: int = 8, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        model = AutoModelForCausalLM.from_pretrained(name)
        lora = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(model, lora)
        self.model.print_trainable_parameters()

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.hparams.lr)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = get_peft_model_state_dict(self.model)

    def on_load_checkpoint(self, checkpoint):
        set_peft_model_state_dict(self.model, checkpoint["state_dict"])
        checkpoint["state_dict"] = self.state_dict()


def train(module, data, **options):
    trainer = L.Trainer(**options)
    trainer.fit(module, data)
    module.model.save_pretrained("adapter")
