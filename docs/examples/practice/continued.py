import lightning as L
import torch
from torch import nn

import lightning_peft as lp


class Continued(L.LightningModule):
    def __init__(self, adapter: str):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        lp.load_adapter(self, adapter, trainable=True)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
