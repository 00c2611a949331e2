"""AdaLoRA equals PEFT over whole runs, its regulariser's gradient equals that of autograd, and it resumes exactly."""

import copy
import pickle

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_peft as lp
from tests.methods.families.test_selection import Module, mlp, trainer

SETTINGS = {"target_r": 2, "init_r": 4, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.7}


class Net(nn.Module):
    """Three linear layers; returns a loss as PEFT's wrapper wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x, y=None):
        out = self.c(self.b(self.a(x).tanh()).tanh())
        loss = None if y is None else nn.functional.mse_loss(out, y)
        return Output(out, loss)


class Output:
    def __init__(self, out, loss):
        self.out, self.loss = out, loss


def pair(**changed):
    """Train the same network and adapters for 14 steps here and in PEFT, in float64."""
    settings = {**SETTINGS, **changed}
    ours = Net().double()
    method = lp.AdaLoRA(targets=["a", "b"], alpha=5, total_step=14, adapter_dtype="float64", **settings)
    lp.apply(ours, method)
    config = peft.AdaLoraConfig(target_modules=["a", "b"], lora_alpha=5, total_step=14, **settings)
    theirs = peft.get_peft_model(Net(), config).double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parts = name.split(".")
                adapter = ours.get_submodule(f"{parts[-3]}.adapters.default")
                getattr(adapter, parts[-2]).copy_(parameter)
    return ours, method, theirs


def data(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(7, 6, generator=g, dtype=torch.float64), torch.randn(7, 5, generator=g, dtype=torch.float64)


def theirs_by_ours(theirs):
    found = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            *_, layer, key, _ = name.split(".")
            found[f"{layer}.adapters.default.{key}"] = parameter
    return found


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"fast_dev_run": True}, {"limit_train_batches": 1}])
def test_a_run_of_a_single_step(options):
    method, module = lp.AdaLoRA(target_r=2, init_r=3), Module()
    trainer(method, **{"max_epochs": 1, **options}).fit(module)
    ranks = method.ranks(module)
    assert method.step == 1
    assert sum(ranks.values()) == 2 * len(ranks)


@pytest.mark.parametrize(
    "changed", [{}, {"tinit": 0, "tfinal": 1, "deltaT": 1}, {"orth_reg_weight": 0.0}, {"target_r": 1, "deltaT": 3}]
)
def test_a_whole_training_equals_peft(changed):
    ours, method, theirs = pair(**changed)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05) for model in (ours, theirs)
    ]
    patterns = []
    for step in range(1, 15):
        x, y = data(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        got, want = ours(x, y), theirs.base_model(x=x, y=y)  # PeftModel itself leaves the orthogonality term out
        torch.testing.assert_close(got.out, want.out, rtol=1e-12, atol=1e-12)
        got.loss.backward()
        want.loss.backward()  # with the orthogonality term, which autograd differentiates
        method.regularize(ours)
        mine, reference = dict(ours.named_parameters()), theirs_by_ours(theirs)
        for name, parameter in reference.items():
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-10, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        method.allocate(ours)
        theirs.base_model.update_and_allocate(step)
        for name, parameter in reference.items():
            torch.testing.assert_close(mine[name], parameter, rtol=1e-9, atol=1e-11)
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern:
            patterns.append(pattern)
            for name, adapter in method.adapters(ours).items():
                kept = next(v for k, v in pattern.items() if f"{name}.lora_E" in k)
                assert adapter.mask.flatten().tolist() == kept
    assert len({str(p) for p in patterns}) > 1
    assert sum(method.ranks(ours).values()) == 2 * method.target_r


def test_start_count_merge_and_disabled():
    model, base = mlp(), mlp()
    x = torch.randn(5, 3)
    method = lp.AdaLoRA(init_r=3, target_r=2, targets=["0", "2"])
    report = lp.apply(model, method)
    assert torch.equal(model(x), base(x))
    assert report.trainable == 3 * (3 + 4 + 1) + 3 * (4 + 4 + 1)
    with torch.no_grad():
        for adapter in method.adapters(model).values():
            adapter.lora_E.normal_()
    out = model(x)
    assert (out - base(x)).abs().max() > 1e-4
    with lp.disabled(model):
        assert torch.equal(model(x), base(x))
    lp.merge(model)
    torch.testing.assert_close(model(x), out)
    lp.unmerge(model)
    assert torch.equal(model(x), out)
    other = copy.deepcopy(pickle.loads(pickle.dumps(model)))
    assert torch.equal(other(x), out)
    fresh = mlp()
    lp.apply(fresh, lp.AdaLoRA(init_r=3, target_r=2, targets=["0", "2"]))
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    assert torch.equal(fresh(x), out)
    assert set(lp.adapter_state(model)) == {
        f"{i}.adapters.default.{k}" for i in "02" for k in ("lora_A", "lora_E", "lora_B", "mask")
    }


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1), nn.Embedding(9, 6)])
def test_other_layers(layer):
    model = nn.Sequential(layer)
    method = lp.AdaLoRA(init_r=2, target_r=1, targets=["0"], total_step=3)
    lp.apply(model, method)
    x = torch.randint(9, (2, 5)) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        method.adapters(model)["0"].lora_E.fill_(3.0)
    out = model(x)
    out.square().sum().backward()
    method.regularize(model)
    lp.merge(model)
    torch.testing.assert_close(model(x), out)


def test_experts_have_a_rank_each():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.einsum("bi,eoi->ebo", x, self.weight)

    model = nn.ModuleDict({"experts": Experts()})
    method = lp.AdaLoRA(init_r=2, target_r=1, targets="experts.weight", total_step=3, orth_reg_weight=0.3)
    lp.apply(model, method)
    adapter = next(iter(method.adapters(model).values()))
    with torch.no_grad():
        adapter.lora_E.normal_()
    model["experts"](torch.randn(2, 5)).square().sum().backward()
    before = {k: p.grad.clone() for k, p in adapter.named_parameters()}
    method.regularize(model)
    norms = [torch.linalg.norm(a @ a.T - torch.eye(2)) for a in adapter.lora_A]
    norms += [torch.linalg.norm(b.T @ b - torch.eye(2)) for b in adapter.lora_B]
    term = 0.3 * torch.stack(norms).mean()
    for parameter, key in zip((adapter.lora_A, adapter.lora_B), ("lora_A", "lora_B")):
        (want,) = torch.autograd.grad(term, parameter, retain_graph=True)
        torch.testing.assert_close(parameter.grad - before[key], want)
    for _ in range(3):
        method.allocate(model)
    assert method.ranks(model) == {"experts.weight": 3} == {"experts.weight": int(adapter.mask.sum())}


def test_the_gradient_of_an_orthogonal_matrix_is_zero():
    model = mlp()
    method = lp.AdaLoRA(init_r=2, target_r=1, targets=["2"])
    lp.apply(model, method)
    adapter = method.adapters(model)["2"]
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(2, 4))
        adapter.lora_B.copy_(torch.eye(4, 2))
    model(torch.randn(2, 3)).sum().backward()
    before = [adapter.lora_A.grad.clone(), adapter.lora_B.grad.clone()]
    method.regularize(model)
    assert torch.equal(before[0], adapter.lora_A.grad)
    assert torch.equal(before[1], adapter.lora_B.grad)


def make(**options):
    settings = {"init_r": 3, "target_r": 1, "tinit": 2, "tfinal": 2, "targets": ["net.0", "net.2"]}
    return lp.AdaLoRA(**{**settings, "trainable": ["net.4"], **options})


class TestTrainer:
    def test_ranks_fall_and_are_logged(self, tmp_path):
        method, module = make(), Module()
        logger = CSVLogger(tmp_path)
        t = trainer(method, max_epochs=3, logger=logger, log_every_n_steps=1)
        t.fit(module)
        assert method.step == t.global_step == 12
        assert sum(method.ranks(module).values()) == 2
        for adapter in method.adapters(module).values():
            assert torch.equal(adapter.lora_E == 0, ~adapter.mask)
        text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
        assert "default/rank/net.0" in text
        assert "default/rank_total" in text
        assert not t.optimizers[0]._optimizer_step_post_hooks
        figure = method.plot(module, tmp_path / "ranks.png")
        assert (tmp_path / "ranks.png").stat().st_size > 1000
        assert [p.get_width() for p in figure.axes[0].patches] == list(method.ranks(module).values())

    def test_wandb_gets_the_ranks_and_their_picture(self, tmp_path, monkeypatch):
        pytest.importorskip("wandb")
        from lightning.pytorch.loggers import WandbLogger

        monkeypatch.setenv("WANDB_MODE", "offline")
        logger = WandbLogger(save_dir=str(tmp_path), project="test")
        method = make()
        trainer(method, max_epochs=3, logger=logger).fit(Module())
        summary = dict(logger.experiment.summary)
        logger.experiment.finish()
        assert summary["default/rank_total"] == 2
        assert {"default/rank/net.0", "default/rank/net.2"} <= summary.keys()
        (picture,) = tmp_path.rglob("*.png")
        assert picture.stat().st_size > 1000

    def test_accumulation_and_clipping_equal_a_term_in_the_loss(self):
        class Reference(Module):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                norms = []
                for layer in (self.net[0], self.net[2]):
                    a, b = layer.adapters["default"].lora_A, layer.adapters["default"].lora_B
                    norms += [torch.linalg.norm(a @ a.T - torch.eye(3)), torch.linalg.norm(b.T @ b - torch.eye(3))]
                return loss + 0.5 * sum(norms) / len(norms)

        results = []
        for module, weight in ((Module(), 0.5), (Reference(), 0.0)):
            L.seed_everything(0, verbose=False)
            method = make(orth_reg_weight=weight, tinit=0, tfinal=1)
            trainer(method, max_epochs=3, accumulate_grad_batches=2, gradient_clip_val=0.1).fit(module)
            assert method.step == 6
            results.append(module)
        for p, q in zip(results[0].parameters(), results[1].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("step", "total"), [(1, 12), (5, 12), (8, None), (11, 12)])
    def test_exact_resume(self, step, total, tmp_path):
        def run(**options):
            L.seed_everything(3, verbose=False)
            saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            module, method = Module(), make(deltaT=2, total_step=total)
            trainer([method, saving], max_epochs=3, enable_checkpointing=True).fit(module, **options)
            return module, method

        whole, method = run()
        other, again = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert method.step == again.step == 12
        for key, value in lp.adapter_state(whole).items():
            assert torch.equal(value, lp.adapter_state(other)[key]), key
        loaded = lp.load_from_checkpoint(Module, tmp_path / "step=12.ckpt")
        for key, value in lp.adapter_state(loaded).items():
            assert torch.equal(value, lp.adapter_state(whole)[key]), key

    def test_a_second_fit_starts_over(self):
        method, module = make(), Module()
        trainer(method, max_epochs=3).fit(module)
        trainer(method, max_epochs=2).fit(module)
        assert method.step == 8

    def test_ranks_of_processes_agree(self):
        class Check(L.Callback):
            def on_train_end(self, trainer, module):
                for key, value in lp.adapter_state(module).items():
                    everywhere = [torch.empty_like(value) for _ in range(2)]
                    torch.distributed.all_gather(everywhere, value.detach())
                    assert torch.equal(*everywhere), key

                assert sum(method.ranks(module).values()) == 2

        method = make(tinit=1, tfinal=1)
        trainer([method, Check()], max_epochs=3, devices=2, strategy="ddp_fork").fit(Module())

    def test_bf16_mixed(self):
        method, module = make(), Module()
        trainer(method, max_epochs=3, precision="bf16-mixed").fit(module)
        assert sum(method.ranks(module).values()) == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target_r": 13}, "target_r=13 is above init_r=12: the rank can only fall"),
            ({"deltaT": 0}, "deltaT must be an integer of at least 1"),
            ({"tinit": -1}, "tinit must be an integer of at least 0"),
            ({"beta1": 1.0}, "beta1 must be a number between 0 and 1"),
            ({"orth_reg_weight": -0.1}, "orth_reg_weight must be a number of 0 or above"),
            ({"alpha": 0}, "alpha must be a finite number other than 0"),
            ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\)"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            lp.AdaLoRA(**options)

    def test_rank_of_a_small_matrix(self):
        with pytest.raises(ValueError, match=r"init_r=12 is above both sides of '0' \(4x3\), whose rank is at most 3"):
            lp.apply(mlp(), lp.AdaLoRA(targets=["0"]))

    def test_no_steps_left_for_the_budget(self):
        with pytest.raises(MisconfigurationException, match="tinit=5 and tfinal=5 leave none of the 10"):
            lp.AdaLoRA(tinit=5, tfinal=5, total_step=10)
        with pytest.raises(MisconfigurationException, match="tinit=8 and tfinal=2 leave none of the 4 optimizer steps"):
            trainer(make(tinit=8), max_epochs=1).fit(Module())

    def test_an_endless_run(self):
        t = trainer(make(), max_epochs=-1)
        with pytest.raises(MisconfigurationException, match="cannot determine the number of optimizer steps"):
            t.fit(Module())
        model = mlp()
        method = lp.AdaLoRA(init_r=2, target_r=1, targets=["0"])
        lp.apply(model, method)
        with pytest.raises(ValueError, match="set total_step"):
            method.allocate(model)
