import lightning as L
import torch
from torch import nn
from torch.nn.functional import softplus

import lightning_peft as lp


class GAN(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))
        self.discriminator = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        (real,) = batch
        for_generator, for_discriminator = self.optimizers()
        made = self.generator(torch.randn(len(real), 4, device=self.device))

        self.toggle_optimizer(for_generator)
        for_generator.zero_grad()
        self.manual_backward(softplus(-self.discriminator(made)).mean())
        for_generator.step()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        for_discriminator.zero_grad()
        loss = softplus(-self.discriminator(real)) + softplus(self.discriminator(made.detach()))
        self.manual_backward(loss.mean())
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

    def configure_optimizers(self):
        parts = self.generator, self.discriminator
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in parts]


methods = [lp.LoRA(r=4, targets="generator.*", trainable=["discriminator"])]
