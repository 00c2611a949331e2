"""``torch.compile`` of adapted models: whole graphs, no recompilation in a training loop, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lightning_peft as lp
from lightning_peft.core.state.state_dict import load_state
from tests.helpers import adapted, assert_compiled_gradients, assert_same_bits, close, evaluate, perturb
from tests.kinds import KINDS, Kind
from tests.table import METHODS, Row, over_table

KINDS_HERE = ["linear", "conv2d", "conv2d_padded", "embedding", "mha_batch_first", "experts", "scaled", "resnet"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@over_table("compile", methods=["lora"], kinds=KINDS_HERE)
def test_one_graph_for_training_and_one_for_eval(row: Row, kind: Kind):
    model = adapted(row, kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        model.train()
        for seed in range(2):
            assert_compiled_gradients(compiled, model, *kind.batch(seed))
        model.eval()
        with torch.no_grad():
            close(compiled(*kind.batch()), model(*kind.batch()))
    assert counter.frame_count <= 2


@over_table("compile", methods=["lora_dropout"], kinds=["linear", "conv2d"])
def test_dropout_compiles(row: Row, kind: Kind):
    model = adapted(row, kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(*kind.batch()).pow(2).mean().backward()
    assert all(p.grad.isfinite().all() for p in lp.trainable_parameters(model))


def test_states_are_exchanged_between_compiled_and_plain():
    kind = KINDS["resnet"]
    compiled = torch.compile(adapted(METHODS["lora"], kind), backend="eager")
    state = lp.adapter_state(compiled)
    assert not [k for k in state if "_orig_mod" in k]
    plain = adapted(METHODS["lora"], kind, moved=False, seed=4)
    load_state(plain, {f"_orig_mod.{k}": v for k, v in state.items()})
    assert_same_bits(lp.adapter_state(plain), state)
    perturb(plain, seed=5)
    load_state(compiled, lp.adapter_state(plain))
    assert torch.equal(evaluate(compiled._orig_mod, kind), evaluate(plain, kind))
