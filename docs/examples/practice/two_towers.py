import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import lightning_peft as lp


class TwoTowers(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.temperature = nn.Parameter(torch.tensor(0.1))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        scores = normalize(self.image(x), dim=-1) @ normalize(self.text(x), dim=-1).T / self.temperature
        return cross_entropy(scores, torch.arange(len(x), device=self.device))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


methods = [
    lp.LoRA(r=4, targets="image.*", name="image", trainable=["temperature"]),
    lp.LoRA(r=2, targets="text.*", name="text"),
]
