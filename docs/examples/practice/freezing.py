import lightning as L
import torch
from torch import nn

import lightning_peft as lp


class Frozen(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        # frozen before the method is applied, so all-linear skips it
        self.judge = nn.Linear(8, 1).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.judge(self.net(batch[0])).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


methods = [lp.LoRA(r=4, trainable=["net.2"])]
