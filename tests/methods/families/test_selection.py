"""Full fine-tuning, linear probe, last layers, BitFit, norm tuning: what trains, how fast, and what is stored."""

import lightning as L
import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lightning_peft as lp
from lightning_peft.methods.families.selection import body_blocks, depths, head_module, tail_modules

SIZE = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZE, max_position_embeddings=16, num_labels=3))


def roberta():
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(**SIZE, max_position_embeddings=16, num_labels=3))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=20, n_positions=16))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(*[Block(4) for _ in range(3)])
        self.group = nn.GroupNorm(2, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.group(self.blocks(self.norm(self.stem(x)))).mean((2, 3)))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def names(model, *parts):
    return {n for n, _ in model.named_parameters() if any(part in n for part in parts)}


class Module(L.LightningModule):
    """A small network on fixed data, with a scheduler and two parameter groups, as users define them."""

    def __init__(self, model="mlp", schedule="lambda", lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = mlp() if model == "mlp" else ConvNet()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        train = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in train if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in train if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr)
        if self.hparams.schedule == "onecycle":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=40)
        else:
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(32, 3, generator=g) if self.hparams.model == "mlp" else torch.randn(32, 1, 8, 8, generator=g)
        data = torch.utils.data.TensorDataset(x, (x.flatten(1).sum(1) > 0).long())
        return torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)


def trainer(method, **options):
    defaults = {
        "callbacks": method if isinstance(method, list) else [method],
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **options})


METHODS = {
    "full": lp.FullFineTuning(),
    "full-decay": lp.FullFineTuning(layer_decay=0.5),
    "probe": lp.LinearProbe(),
    "last": lp.LastLayers(n=1, layer_decay=0.5),
    "bitfit": lp.BitFit(trainable=["net.4"]),
    "gradual": lp.GradualUnfreezing(schedule=[1, 2], layer_decay=0.5),
}


class TestWhatTrains:
    def test_full(self):
        model = bert()
        report = lp.apply(model, lp.FullFineTuning())
        assert report.trainable == report.total == sum(p.numel() for p in model.parameters())
        assert list(report.modules) == [""]
        assert report.summary().endswith("(100 %)")

    def test_full_targets_and_exclude(self):
        model = bert()
        lp.apply(model, lp.FullFineTuning(targets=["encoder", "classifier"], exclude=["layer.0", "type:LayerNorm"]))
        assert trained(model) == names(model, "encoder", "classifier") - names(model, "layer.0.", "LayerNorm")

    @pytest.mark.parametrize(
        ("build", "head"),
        [(bert, "classifier"), (roberta, "classifier"), (llama, "lm_head"), (mlp, "4"), (ConvNet, "fc")],
    )
    def test_probe_finds_the_head(self, build, head):
        model = build()
        report = lp.apply(model, lp.LinearProbe())
        assert trained(model) == names(model, f"{head}.")
        assert report.trainable == sum(p.numel() for p in model.get_submodule(head).parameters())

    def test_probe_named_by_hand(self):
        model = bert()
        lp.apply(model, lp.LinearProbe(trainable=["pooler"]))
        assert trained(model) == names(model, "pooler")

    def test_probe_says_what_is_tied(self):
        report = lp.apply(gpt2(), lp.LinearProbe())
        assert "lm_head shares its weight with transformer.wte.weight" in str(report.notes)

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_last_layers(self, n):
        model = bert()
        lp.apply(model, lp.LastLayers(n=n))
        assert trained(model) == names(model, "pooler", "classifier", *[f"layer.{i}." for i in range(3 - n, 3)])

    def test_last_layers_of_others(self):
        model = llama()
        lp.apply(model, lp.LastLayers())
        assert trained(model) == names(model, "layers.2.", "lm_head", "model.norm")
        model = ConvNet()
        lp.apply(model, lp.LastLayers(n=2))
        assert trained(model) == names(model, "blocks.1", "blocks.2", "group", "fc")
        model = bert()
        lp.apply(model, lp.LastLayers(targets="attention.output", n=1, exclude="LayerNorm"))
        assert trained(model) == names(model, "2.attention.output.dense", "pooler", "classifier")

    def test_bitfit_counts_the_biases(self):
        model = bert()
        report = lp.apply(model, lp.BitFit(trainable=["classifier"]))
        biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
        assert report.trainable == biases + 8 * 3
        assert trained(model) == names(model, "bias", "classifier")
        model = bert()
        report = lp.apply(model, lp.BitFit(targets=["query", "intermediate.dense"]))
        assert report.trainable == 3 * (8 + 12)

    def test_bitfit_of_attention_and_lstm(self):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, add_bias_kv=True), "b": nn.LSTM(4, 4)})
        lp.apply(model, lp.BitFit())
        assert trained(model) == {"a.in_proj_bias", "a.out_proj.bias", "b.bias_ih_l0", "b.bias_hh_l0"}

    def test_norms(self):
        model = bert()
        assert lp.apply(model, lp.NormTuning()).trainable == (2 * 3 + 1) * 2 * 8
        assert trained(model) == names(model, "LayerNorm")
        assert lp.apply(llama(), lp.NormTuning()).trainable == (2 * 3 + 1) * 8
        assert lp.apply(ConvNet(), lp.NormTuning()).trainable == 5 * 2 * 4
        model = ConvNet()
        lp.apply(model, lp.NormTuning(parts="bias", exclude=["blocks.0"]))
        assert trained(model) == names(model, "norm.bias", "group.bias") - names(model, "blocks.0")

    def test_order_of_methods_changes_nothing(self):
        for order in (1, -1):
            model = mlp()
            methods = [lp.LoRA(r=1, targets=["0"], name="lora"), lp.FullFineTuning(name="full")]
            report = lp.apply(model, *methods[::order])
            assert trained(model) == {n for n, _ in model.named_parameters()}
            assert report.trainable == report.total
            model = mlp()
            lp.apply(model, *[lp.BitFit(name="b"), lp.GradualUnfreezing(name="g")][::order])
            assert trained(model) == {"0.bias", "2.bias", "4.weight", "4.bias"}
            assert list(model.__dict__["_peft_injection"].deferred) == ["2.weight", "0.weight"]


class TestNormStatistics:
    @pytest.mark.parametrize("move", [False, True])
    def test_norm_statistics_move_only_if_train_norm_stats(self, move):
        model = ConvNet()
        lp.apply(model, lp.NormTuning(targets=["blocks"], train_norm_stats=move))
        before = {n: b.clone() for n, b in model.named_buffers()}
        model.train()
        optimizer = torch.optim.SGD(lp.trainable_parameters(model), lr=0.1)
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        moved = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
        assert moved == (set(before) if move else set())
        assert any("running_mean" in k for k in lp.adapter_state(model)) == move

    @pytest.mark.parametrize(
        "method", [lp.BitFit(), lp.NormTuning(parts="bias"), lp.LinearProbe(trainable=["blocks.0.norm.weight"])]
    )
    def test_layers_that_train_in_part_keep_theirs(self, method, tmp_path):
        model = ConvNet()
        lp.apply(model, method)
        before = {n: b.clone() for n, b in model.named_buffers()}
        model.train()(torch.randn(4, 1, 8, 8))
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())

    def test_trained_blocks_move_theirs(self):
        model = ConvNet()
        lp.apply(model, lp.LastLayers(n=1))
        model.train()(torch.randn(4, 1, 8, 8))
        assert {k for k in lp.adapter_state(model) if "running_mean" in k} == {"blocks.2.norm.running_mean"}


class TestDepths:
    def test_of_bert(self):
        found = depths(bert())
        assert body_blocks(bert()) == [f"bert.encoder.layer.{i}" for i in range(3)]
        wanted = {"embeddings": 4, "layer.0.": 3, "layer.1.": 2, "layer.2.": 1, "pooler": 0, "classifier": 0}
        for name, depth in found.items():
            assert depth == next(d for part, d in wanted.items() if part in name), name

    def test_of_others(self):
        assert list(depths(mlp()).values()) == [2, 2, 1, 1, 0, 0]
        assert tail_modules(mlp()) == ["4"]
        assert tail_modules(llama()) == ["model.norm", "lm_head"]
        assert head_module(roberta()) == "classifier"

    def test_rates_follow_depth_and_schedulers_follow(self):
        for schedule in ("lambda", "onecycle"):
            module = Module(schedule=schedule)
            t = trainer(lp.FullFineTuning(layer_decay=0.5), max_epochs=1)
            t.fit(module)
            groups = t.optimizers[0].param_groups
            ids = {id(p): n for n, p in module.named_parameters()}
            rates = {ids[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
            for layer, depth in (("0", 2), ("2", 1), ("4", 0)):
                for kind, decay in (("weight", 0.1), ("bias", 0.0)):
                    top = rates[f"net.4.{kind}"][0]
                    assert rates[f"net.{layer}.{kind}"] == (pytest.approx(top * 0.5**depth, rel=1e-12), decay)
            if schedule == "lambda":
                assert rates["net.4.weight"][0] == pytest.approx(0.1 * 0.95**4)
            else:
                assert rates["net.4.bias"][0] == pytest.approx(2 * rates["net.4.weight"][0])
                assert len(groups) == 6


def test_norm_tuning_equals_peft():
    """The same parameters train as in peft's LN tuning; gradients, and outputs after a step, agree bit for bit."""
    ours, theirs = llama().double(), llama().double()
    lp.apply(ours, lp.NormTuning())
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"])
    theirs = peft.get_peft_model(theirs, config)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in ours.parameters() if p.requires_grad) == 7 * 8
    tokens = torch.arange(12).view(2, 6)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert torch.equal(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits)
    want = [p.grad for p in theirs.parameters() if p.requires_grad]
    got = [p.grad for p in ours.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
