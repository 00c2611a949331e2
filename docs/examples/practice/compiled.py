import lightning as L
import torch
from torch import nn


class Compiled(L.LightningModule):
    def __init__(self, backend: str = "inductor"):
        super().__init__()
        self.backend = backend
        self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def on_fit_start(self):
        self.net.compile(backend=self.backend)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
