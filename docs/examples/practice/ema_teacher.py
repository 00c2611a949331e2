import copy

import lightning as L
import torch
from torch import nn

import lightning_peft as lp


class SelfDistillation(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.teacher = None

    def configure_model(self):
        if self.teacher is None:
            lp.apply(self)  # the methods among the Trainer's callbacks
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        noisy = x + 0.1 * torch.randn_like(x)
        return nn.functional.mse_loss(self.student(noisy), self.teacher(x))

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for mean, now in zip(self.teacher.parameters(), self.student.parameters()):
            mean.lerp_(now, 0.01)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=1e-2)
