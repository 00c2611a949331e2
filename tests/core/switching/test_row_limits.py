"""Mixed batches: what is refused, contexts, dtypes, copies, and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from tests.core.adapters.test_stack import Add
from tests.core.switching.test_rows import OwnBlocks, one_by_one, two_loras
from tests.helpers import close, differ, perturb
from tests.kinds import KINDS, MLP


def errors() -> dict[str, tuple[nn.Module, Any, Callable[[nn.Module], Any], str]]:
    spanning = OwnBlocks()
    lp.apply(spanning, lp.VisualPromptTuning(2, leading_tokens=0, name="a"))
    bias = MLP()
    lp.apply(bias, lp.BitFit(name="bias"), lp.LoRA(r=2, name="a"))
    table = KINDS["embedding"].build()
    lp.apply(table, lp.LoRA(r=2, targets=["position"], name="a"))
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])})
    lp.apply(experts, lp.LoRA(r=2, targets=["re:experts.*"], name="a"))
    merged = two_loras()
    lp.merge(merged, "a")
    sequence = KINDS["mha"].build()
    lp.apply(sequence, lp.BottleneckAdapter(targets=["type:MultiheadAttention"], bottleneck_size=2, name="a"))

    def none(model: nn.Module) -> None:
        raise AssertionError("this should not be reached")

    def run(*shape: int) -> Callable[[nn.Module], Any]:
        return lambda model: model(torch.randn(*shape))

    return {
        "unknown": (two_loras(), ["a", "bb"], none, r"row 1: no adapter named 'bb'; nearest: 'b'"),
        "a string": (two_loras(), "ab", none, "one entry for each row"),
        "empty": (two_loras(), [], none, "one entry for each row"),
        "twice": (two_loras(), [("a", "a")], none, "row 0 names an adapter twice"),
        "base parameters": (
            bias,
            ["a", "bias"],
            none,
            r"'bias' \(BitFit\) trains .*lp.load_adapter",
        ),
        "merged": (merged, ["a", "b"], none, r"are merged into 'up': call lp.unmerge\(model\) first"),
        "length": (two_loras(), ["a", "b", None], run(4, 6), "a batch of 4 .* for 3 names: pass as many"),
        "length, one adapter": (two_loras(), ["a", "a", "a"], run(4, 6), "a batch of 4 .* for 3 names: pass as many"),
        "positions": (table, ["a", None], lambda m: m(torch.ones(2, 2, dtype=torch.long)), "'position' .*look like"),
        "experts": (
            experts,
            ["a", None],
            lambda m: m["experts"][1](torch.randn(4, 6)),
            r"'experts.1' .* several experts",
        ),
        "no root": (spanning, ["a", None], lambda m: m.step(torch.randn(2, 5, 8)), "was not called"),
        "sequence first": (sequence, ["a", None, "a"], lambda m: m(torch.randn(5, 4, 8)), "for 3 names"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors(case):
    model, names, run, message = errors()[case]
    with pytest.raises(lp.RowError, match=message), lp.rows(model, names):
        run(model)
    for module in model.modules():
        assert getattr(module, "dispatcher", None) is None or not module.dispatcher.open


def test_inside_disabled():
    model = two_loras()
    with pytest.raises(lp.RowError, match="does nothing inside"), lp.disabled(model), lp.rows(model, ["a"]):
        pass


@torch.no_grad()
def test_contexts_nest_and_end():
    model, x = two_loras(), torch.randn(2, 6)
    before = model(x)
    with lp.rows(model, None):
        assert torch.equal(model(x), before)
    with lp.rows(model, ["a", None]):
        outer = model(x)
        with lp.rows(model, ["b", "a"]):
            differ(model(x), outer)
        assert torch.equal(model(x), outer)
        with lp.disabled(model):
            differ(model(x), outer)
        with lp.adapter_drop(model, 1):
            differ(model(x), outer)
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_adapters_that_are_any_module_around_the_host():
    """An adapter without a batched class: the host runs once for each adapter."""
    from lightning_peft.core.injection.attach import attach

    model = MLP()
    for name, value in (("one", 1.0), ("two", 2.0)):
        attach(model, "mid", name, Add(value))
    x = torch.randn(3, 5, 6)
    names = ["two", None, "one"]
    want = one_by_one(model, names, lambda i: model(x[i : i + 1]))
    with lp.rows(model, names):
        close(model(x), torch.cat(want))


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    model, x = two_loras(), torch.randn(4, 6)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    names = ["a", None, "b", "a"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = torch.cat(one_by_one(model, names, lambda i: model(x[i : i + 1])))
        with lp.rows(model, names):
            got = model(x)
            with torch.inference_mode():
                close(model(x).clone(), got, 0.02)
            model(x).float().sum().backward()  # factors that were kept in inference are not used for gradients
    assert got.dtype == want.dtype == torch.bfloat16
    close(got, want, 0.02)
    assert model.up.adapters["b"].lora_B.grad.abs().max() > 0


def test_models_can_be_copied_inside_and_train_on_outside():
    import copy

    model, x = two_loras(), torch.randn(2, 6)
    before = model(x)
    with lp.rows(model, ["a", None]):
        other = copy.deepcopy(model)
        model(x).sum().backward()
    assert torch.equal(other(x), before)
    assert torch.equal(model(x), before)


class ExpertMajor(nn.Module):
    """A mixture whose experts get all tokens repeated for each expert, as in Llama 4."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(2, 6, 6))

        def forward(self, x, *routing):
            if routing:  # each token goes to the expert with its index
                return torch.einsum("ni,nio->no", x, self.down_proj[routing[0]])
            return (x.view(2, -1, 6) @ self.down_proj).view(-1, 6)

    def __init__(self, routed):
        super().__init__()
        self.experts, self.routed = self.Experts(), routed

    def forward(self, x):
        tokens = x.reshape(-1, 6)
        if self.routed:
            return self.experts(tokens, torch.arange(len(tokens)) % 2).view(x.shape)
        return self.experts(tokens.repeat(2, 1)).view(2, *x.shape).sum(0)


@pytest.mark.parametrize("routed", [False, True])
def test_stacked_experts_that_see_the_batch_expert_by_expert_are_refused(routed):
    torch.manual_seed(0)
    model = ExpertMajor(routed)
    lp.apply(model, lp.LoRA(r=2, targets=["down_proj"], name="a"))
    perturb(model)
    x = torch.randn(3, 4, 6)
    with lp.rows(model, ["a", "a", "a"]):  # all rows have the same adapters
        close(model(x), model(x))
    with lp.rows(model, ["a", None, "a"]):
        if not routed:
            with pytest.raises(
                lp.RowError, match=r"'experts' \(Experts\) holds 2 experts and was called with \(24, 6\)"
            ):
                model(x)
            return
        got = model(x)
    with lp.disabled(model):
        base = model(x)
    close(got, torch.stack([model(x)[0], base[1], model(x)[2]]))
