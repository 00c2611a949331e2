"""DyLoRA: one adapter that equals a LoRA at every rank."""

import copy

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_peft as lp
from tests.methods.families.test_selection import Module, mlp, trainer


def moved(model, method):
    lp.apply(model, method)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in method.adapters_by_weight(model).values():
            part.lora_B.normal_(generator=g)
    return model


def as_lora(model, method, rank):
    """A plain LoRA of rank ``rank`` from the first rows and columns."""
    plain = mlp()
    lora = lp.LoRA(r=rank, alpha=method.alpha, targets=["0", "2"])
    lp.apply(plain, lora)
    with torch.no_grad():
        for name, part in method.adapters_by_weight(model).items():
            other = lora.adapters_by_weight(plain)[name]
            other.lora_A.copy_(part.lora_A[:rank])
            other.lora_B.copy_(part.lora_B[:, :rank])
    return plain, lora


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_rank_is_a_lora(rank):
    method = lp.DyLoRA(r=3, alpha=5, targets=["0", "2"])
    model = moved(mlp(), method)
    plain, lora = as_lora(model, method, rank)
    # in training
    for part in method.adapters_by_weight(model).values():
        part.train_at(rank)
    torch.testing.assert_close(model(X), plain(X))
    model(X).square().sum().backward()
    plain(X).square().sum().backward()
    for name, part in method.adapters_by_weight(model).items():
        other = lora.adapters_by_weight(plain)[name]
        torch.testing.assert_close(part.lora_A.grad[:rank], other.lora_A.grad)
        torch.testing.assert_close(part.lora_B.grad[:, :rank], other.lora_B.grad)
        assert not part.lora_A.grad[rank:].any()
        assert not part.lora_B.grad[:, rank:].any()
    # in evaluation, before and after truncation
    model.eval()
    full = model(X)
    lp.DyLoRA.truncate(model, rank)
    out = model(X)
    torch.testing.assert_close(out, plain(X))
    assert rank == 3 or (out - full).abs().max() > 1e-4
    base = copy.deepcopy(model.state_dict())
    lp.merge(model)
    torch.testing.assert_close(model(X), out)
    lp.unmerge(model)
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    lp.DyLoRA.truncate(model, 3)
    assert torch.equal(model(X), full)
    lp.DyLoRA.truncate(model, rank, cut=True)
    torch.testing.assert_close(model(X), plain(X))
    assert method.r == rank
    fresh = mlp().eval()
    lp.apply(fresh, lp.DyLoRA(r=rank, alpha=5, targets=["0", "2"]))
    fresh.load_state_dict(lp.adapter_state(model), strict=False)
    torch.testing.assert_close(fresh(X), out)


@pytest.mark.parametrize("rank", [1, 3])
def test_frozen_trains_one_row(rank):
    grads = []
    for frozen in (False, True):
        method = lp.DyLoRA(r=3, targets=["0", "2"], frozen=frozen)
        model = moved(mlp(), method)
        for part in method.adapters_by_weight(model).values():
            part.train_at(rank)
        out = model(X)
        out.square().sum().backward()
        grads.append((out, {n: (p.lora_A.grad, p.lora_B.grad) for n, p in method.adapters_by_weight(model).items()}))
    (out, full), (out_frozen, one) = grads
    assert torch.equal(out, out_frozen)
    row = rank - 1
    for name in full:
        for wide, want in zip(one[name], full[name]):
            wide, want = (wide, want) if wide is one[name][0] else (wide.T, want.T)
            torch.testing.assert_close(wide[row], want[row])
            assert not wide[torch.arange(3) != row].any()


def test_start_count_and_disabled():
    method = lp.DyLoRA(r=3, targets=["0", "2"])
    model = mlp()
    assert lp.apply(model, method).trainable == 3 * (3 + 4) + 3 * (4 + 4)
    assert torch.equal(model(X), mlp()(X))
    model = moved(mlp(), lp.DyLoRA(r=3, targets=["0", "2"]))
    with lp.disabled(model):
        assert torch.equal(model(X), mlp()(X))
    assert not any("gate" in key or "last" in key for key in lp.adapter_state(model))


def test_convolutions_embeddings_and_dropout():
    for layer, x in (
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), torch.randn(2, 4, 5, 5)),
        (nn.Embedding(9, 6), torch.randint(9, (2, 5))),
    ):
        method = lp.DyLoRA(r=3, targets=["0"])
        model = moved(nn.Sequential(layer), method).eval()
        lp.DyLoRA.truncate(model, 2)
        out = model(x)
        lp.merge(model)
        torch.testing.assert_close(model(x), out)
    method = lp.DyLoRA(r=3, targets=["0"], dropout=0.5)
    model = moved(mlp(), method)
    method.sample(model, 0)
    assert not torch.equal(model(X), model(X))


def test_sampling_is_uniform_and_seeded():
    model, method = mlp(), lp.DyLoRA(r=4, targets=["2"])
    lp.apply(model, method)
    ranks = [method.sample(model, step) for step in range(400)]
    assert all(70 < ranks.count(rank) < 130 for rank in (1, 2, 3, 4))
    assert ranks == [method.sample(model, step) for step in range(400)]
    assert ranks != [lp.DyLoRA(r=4, seed=1, targets=["2"]).sample(mlp(), step) for step in range(400)]


def test_one_graph_serves_all_ranks():
    model, method = mlp(), lp.DyLoRA(r=3, targets=["0", "2"])
    moved(model, method)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(6):
        method.sample(model, step)
        torch.testing.assert_close(compiled(X), model(X))
    assert counter.frame_count == 1


def make(**options):
    return lp.DyLoRA(**{"r": 3, "targets": ["net.0", "net.2"], "trainable": ["net.4"], **options})


@pytest.mark.parametrize("frozen", [False, True])
def test_exact_resume(frozen, tmp_path):
    def run(seed=3, **options):
        L.seed_everything(seed, verbose=False)
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = Module()
        trainer([make(frozen=frozen), saving], enable_checkpointing=True).fit(module, **options)
        return module

    whole = run()
    for seed in (3, 4):  # the ranks are those of the original run, even if the seed is different now
        other = run(seed, ckpt_path=tmp_path / "step=3.ckpt")
        for key, value in lp.adapter_state(whole).items():
            assert torch.equal(value, lp.adapter_state(other)[key]), key
    loaded = lp.load_from_checkpoint(Module, tmp_path / "step=8.ckpt")
    assert torch.equal(loaded.eval().net(X), whole.eval().net(X))


def test_one_rank_for_accumulated_batches():
    seen = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            pass

        def on_train_batch_end(self, trainer, module, *args):
            seen.append(int((method.adapters_by_weight(module)["net.0"].gate > 0).sum()))

    method = make(r=4, targets=["net.0"])
    trainer([method, Watch()], max_epochs=4, accumulate_grad_batches=2).fit(Module())
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) > 1


class TestErrors:
    def test_arguments(self):
        with pytest.raises(ValueError, match="r must be an integer of at least 1"):
            lp.DyLoRA(r=0)
        with pytest.raises(ValueError, match="alpha must be a finite number other than 0"):
            lp.DyLoRA(alpha=0)
        with pytest.raises(ValueError, match=r"r=8 is above both sides of '0' \(4x3\), whose rank is at most 3"):
            lp.apply(mlp(), lp.DyLoRA(targets=["0"]))

    def test_dropout_where_the_weight_is_read(self):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
        with pytest.raises(ValueError, match=r"dropout=0.1 is not supported on 'a.in_proj_weight'"):
            lp.apply(model, lp.DyLoRA(r=2, dropout=0.1, targets=["a"]))

    def test_truncation(self):
        model = moved(mlp(), lp.DyLoRA(r=3, targets=["0", "2"]))
        with pytest.raises(ValueError, match="rank=4 is above r=3, the highest rank of 'default'"):
            lp.DyLoRA.truncate(model, 4)
        with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
            lp.DyLoRA.truncate(model, 0)
        with pytest.raises(ValueError, match="no DyLoRA adapter named 'x'"):
            lp.DyLoRA.truncate(model, 2, name="x")
        with pytest.raises(ValueError, match="no DyLoRA adapter to truncate"):
            lp.DyLoRA.truncate(mlp(), 2)
