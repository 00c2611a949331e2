"""Dropout of low-rank adapters: on an embedding it has no effect, because a dropped token id would be another token."""

import pytest
import torch
from torch import nn

import lightning_peft as lp


@pytest.mark.parametrize("method", ["LoRA", "AdaLoRA", "DyLoRA", "VeRA", "MiSS", "HiRA"])
def test_an_embedding_ignores_dropout(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16))
    rank = {"init_r": 4, "target_r": 4} if method == "AdaLoRA" else {"r": 4}
    lp.apply(model, getattr(lp, method)(dropout=0.5, targets=["0"], **rank))
    for parameter in lp.trainable_parameters(model):
        nn.init.normal_(parameter)
    tokens = torch.arange(1, 20)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))
