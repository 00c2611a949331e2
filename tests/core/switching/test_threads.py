"""Test that threads that share an adapted model do not affect each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from tests.helpers import perturb

TRANSFORMERS = pytest.importorskip("transformers")
METHODS: dict[str, Callable[..., Any]] = {
    "LoRA": lambda **o: lp.LoRA(r=2, **o),
    "DoRA": lambda **o: lp.DoRA(r=2, **o),
    "AdaLoRA": lambda **o: lp.AdaLoRA(**o),
    "DyLoRA": lambda **o: lp.DyLoRA(r=2, **o),
    "VeRA": lambda **o: lp.VeRA(r=4, **o),
    "LoHa": lambda **o: lp.LoHa(r=2, **o),
    "LoKr": lambda **o: lp.LoKr(r=2, **o),
    "OFT": lambda **o: lp.OFT(block_size=4, **o),
    "IA3": lambda **o: lp.IA3(**o),
    "SSF": lambda **o: lp.SSF(**o),
    "BottleneckAdapter": lambda **o: lp.BottleneckAdapter(bottleneck_size=4, parallel=True, **o),
    "PrefixTuning": lambda **o: lp.PrefixTuning(3, **o),
    "PromptTuning": lambda **o: lp.PromptTuning(3, **o),
    "PTuning": lambda **o: lp.PTuning(3, **o),
}
X = torch.arange(4, 20).view(2, 8)


def llama(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = TRANSFORMERS.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return TRANSFORMERS.LlamaForCausalLM(config).eval()


def differing(*calls: Callable[[], Tensor], runs: int = 12) -> list[str]:
    """Repeat each call in its own thread, and return the errors and differences."""
    with torch.no_grad():
        expected = [call() for call in calls]
    wrong: list[str] = []
    start = threading.Barrier(len(calls))

    def work(i: int) -> None:
        start.wait()
        for _ in range(runs):
            try:
                with torch.no_grad():
                    if not torch.allclose(calls[i](), expected[i], atol=1e-5):
                        wrong.append(f"thread {i} differs")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.fixture(autouse=True)
def _quick_switching() -> Any:
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, attention: str) -> None:
    if attention == "eager" and method != "PrefixTuning":
        pytest.skip("the same as with sdpa")
    model = llama(attention)
    lp.apply(model, METHODS[method]())
    perturb(model)
    labels = X.clone()
    assert (
        differing(
            lambda: model(X).logits,
            lambda: model(X[:1]).logits,
            lambda: model(X, labels=labels).logits,
            lambda: disabled(model),
        )
        == []
    )
    assert all(type(m.config).__name__ == "LlamaConfig" for m in model.modules() if hasattr(m, "config"))


def disabled(model: Any) -> Tensor:
    with lp.disabled(model):
        return model(X).logits


@pytest.mark.parametrize("method", ["LoRA", "LoHa", "DoRA", "BottleneckAdapter", "PrefixTuning", "PromptTuning"])
def test_contexts_hold_for_their_thread(method: str) -> None:
    model = llama()
    for name in ("a", "b"):
        lp.apply(model, METHODS[method](name=name))
    perturb(model)

    def call(context: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with context():
                return model(X, use_cache=False).logits

        return run

    contexts = [
        lambda: lp.active(model, "a"),
        lambda: lp.active(model, "b"),
        lambda: lp.rows(model, ["a", "b"]),
        lambda: lp.rows(model, ["b", None]),
        nullcontext,
    ]
    if method != "PromptTuning":  # its adapter is not in any block
        contexts.append(lambda: lp.adapter_drop(model, 1))
    assert differing(*map(call, contexts), runs=5) == []
    assert [type(m) for m in lp.unload(model).modules()] == [type(m) for m in llama().modules()]


def test_rows_change_nothing_that_other_threads_call() -> None:
    """torch's hooks cannot be added or removed during a call, nor can a class whose forward is running."""
    model, x = two()

    def called() -> list[Any]:
        return [(type(m), *m._forward_pre_hooks, *m._forward_hooks) for m in model.modules()]

    with lp.rows(model, ["a", "b"]):
        inside = called()
        with pytest.raises(lp.RowError, match="batch of 1"):
            model(x[:1])
        model(x)
    assert called() == inside
    assert not any(hooks for _, *hooks in inside)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rnn = nn.Linear(6, 6), nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True)
        self.checkpointed: bool | None = None  # use_reentrant

    def inner(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) if self.checkpointed is None else checkpoint(self.inner, x, use_reentrant=self.checkpointed)
        return self.rnn(x)[0]


def two(*methods: Any) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net()
    lp.apply(model, *(methods or [lp.LoRA(r=2, name=n, targets=["a", "b"]) for n in ("a", "b")]))
    perturb(model)
    return model, torch.randn(2, 3, 6)


def loaded(directory: Path) -> tuple[Net, Tensor]:
    """A net whose recurrent layer has another state with the adapter."""
    trained, x = two(lp.LoRA(r=2, targets=["a"], trainable=["rnn"]))
    with torch.no_grad():
        for parameter in trained.rnn.parameters():
            parameter += 0.3
    lp.save_adapter(trained, directory)
    torch.manual_seed(0)
    lp.load_adapter(model := Net(), directory)
    assert not torch.allclose(model(x), disabled_net(model, x))
    return model, x


def test_recurrent_layers_that_were_loaded(tmp_path: Path) -> None:
    model, x = loaded(tmp_path)
    assert differing(lambda: model(x), lambda: disabled_net(model, x), lambda: model(x[:1])) == []


def test_a_recurrent_layer_in_the_middle_of_another_call(tmp_path: Path) -> None:
    model, x = loaded(tmp_path)
    with torch.no_grad():
        expected, plain = model(x), disabled_net(model, x)
    check, seen = model.rnn.check_forward_args, []

    def interrupted(*args: Any) -> None:
        model.rnn.check_forward_args = check
        thread = threading.Thread(target=lambda: seen.append(disabled_net(model, x)))
        thread.start()
        thread.join()
        check(*args)

    model.rnn.check_forward_args = interrupted
    assert torch.allclose(model(x), expected)
    assert torch.allclose(seen[0], plain)


def disabled_net(model: Net, x: Tensor) -> Tensor:
    with lp.disabled(model):
        return model(x)


@pytest.mark.parametrize("context", ["active", "rows"])
def test_a_checkpointed_forward_is_repeated_as_it_ran(context: str) -> None:
    """Backward runs after the context has exited, when another adapter is active."""
    model, x = two()
    lp.set_active(model, "a")

    def gradients(checkpointed: bool | None) -> list[Tensor | None]:
        model.checkpointed = checkpointed
        model.zero_grad()
        with lp.active(model, "b") if context == "active" else lp.rows(model, ["b", "a"]):
            loss = model(x.requires_grad_()).square().sum()
        loss.backward()
        return [p.grad for p in model.parameters()]

    for plain, again in zip(gradients(None), gradients(False)):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again)


def test_tasks_of_one_thread() -> None:
    model, x = two()

    async def call(name: str) -> Tensor:
        with lp.active(model, name):
            await asyncio.sleep(0)
            with torch.no_grad():
                return model(x)

    async def both() -> list[Tensor]:
        return list(await asyncio.gather(call("a"), call("b"), call("a")))

    got = asyncio.run(both())
    for name, out in zip("aba", got):
        with lp.active(model, name), torch.no_grad():
            assert torch.equal(out, model(x))
    with lp.active(model, "a", "b"), torch.no_grad():
        expected = model.inner(x)
    assert torch.equal(torch.compile(model.inner, backend="eager")(x), expected)  # all contexts have exited


def test_compiled_code_sees_the_context_of_its_thread() -> None:
    model, x = two()
    compiled = torch.compile(model.inner, backend="eager")

    def call(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with lp.active(model, name):
                return compiled(x)

        return run

    assert differing(call("a"), call("b"), runs=5) == []


def test_replicas_of_data_parallel_see_the_context() -> None:
    model, _ = two()
    with lp.active(model, "b"), torch.no_grad():
        stack: Any = model.a.adapters
        replica = stack._replicate_for_data_parallel()
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.extend([replica.active, stack.active]))
        thread.start()
        thread.join()
    assert seen == [("b",), ("a", "b")]
