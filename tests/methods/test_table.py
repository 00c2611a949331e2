"""Test the invariants of every method on every layer kind (see ``tests/table.py``)."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.core.adapters.lookup import hosts
from lightning_peft.core.state.state_dict import load_state
from lightning_peft.core.targeting.ties import tied_names
from tests.helpers import (
    adapted,
    adapter_parameters,
    assert_same_bits,
    bits,
    classes,
    close,
    differ,
    evaluate,
    perturb,
    same,
    trained_parameters,
)
from tests.holes import ANY, HOLES, REFUSED
from tests.kinds import KINDS, Kind
from tests.table import METHODS, Row, over_table

INVARIANTS: set[str] = set()


def holds(invariant: str, **options):
    """Mark a test as the definition of ``invariant``."""
    INVARIANTS.add(invariant)
    return over_table(invariant, **options)


@holds("identity")
def test_adapted_model_starts_as_its_base(row: Row, kind: Kind):
    model = kind.build()
    before = evaluate(model, kind)
    lp.apply(model, row.make(kind))
    close(evaluate(model, kind), before, 1e-6)


@holds("count")
def test_trainable_count_is_the_formula(row: Row, kind: Kind):
    model = kind.build()
    plain = sum(p.numel() for p in model.parameters())
    expected = row.count(kind, model)
    previewed = lp.inspect(model, row.make(kind))
    report = lp.apply(model, row.make(kind))
    assert report.trainable == expected == sum(p.numel() for p in lp.trainable_parameters(model))
    assert report.total == sum(p.numel() for p in model.parameters()) >= plain
    assert (previewed.trainable, previewed.total, previewed.modules) == (report.trainable, report.total, report.modules)


@holds("training")
def test_adapters_train_and_nothing_else_moves(row: Row, kind: Kind):
    model = adapted(row, kind, moved=False)
    trained = trained_parameters(model)
    before = bits(model)
    # With decay and momentum on all parameters, frozen ones must not move even if the optimizer holds them.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        output = model(*kind.batch(seed))
        torch.nn.functional.mse_loss(output, torch.ones_like(output)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    after = bits(model)
    assert_same_bits(
        {k: after[k] for k in after if k not in trained}, {k: before[k] for k in before if k not in trained}
    )
    still = [k for k in trained if torch.equal(before[k], after[k])]
    assert not still, f"never moved: {still}"


@holds("all_train")
def test_every_adapter_parameter_trains(row: Row, kind: Kind):
    model = adapted(row, kind, moved=False)
    assert adapter_parameters(model).keys() <= trained_parameters(model).keys()


@holds("state")
def test_state_round_trip(row: Row, kind: Kind):
    model = adapted(row, kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    state = lp.adapter_state(model)
    trained = trained_parameters(model).keys()
    owned = {key for key in model.state_dict() if ".adapters." in f".{key}"}  # also the adapters' buffers
    assert set(state) == trained | owned
    fresh = adapted(row, kind, moved=False, seed=99)
    load_state(fresh, state)
    assert torch.equal(evaluate(fresh, kind), evaluate(model, kind))


@holds("disabled")
def test_disabled_is_the_base(row: Row, kind: Kind):
    before = evaluate(kind.build(), kind)
    model = adapted(row, kind)
    differ(evaluate(model, kind), before)
    with lp.disabled(model):
        same(kind, evaluate(model, kind), before)
    differ(evaluate(model, kind), before)


@holds("eval")
def test_eval_runs_the_adapters(row: Row, kind: Kind):
    model = adapted(row, kind).eval()
    base = kind.build().eval()
    with torch.inference_mode():
        differ(model(*kind.batch()), base(*kind.batch()))


@holds("modes")
def test_training_and_eval_mode_compute_the_same(row: Row, kind: Kind):
    model = adapted(row, kind)
    close(model.eval()(*kind.batch()), model.train()(*kind.batch()))


@holds("merge")
def test_merged_is_the_forward_and_unmerged_is_the_base(row: Row, kind: Kind):
    model = adapted(row, kind)
    before, unmerged = bits(model), evaluate(model, kind)
    lp.merge(model)
    close(evaluate(model, kind), unmerged, 2e-5)
    lp.unmerge(model)
    assert_same_bits(bits(model), before)
    assert torch.equal(evaluate(model, kind), unmerged)


@holds("merge_float64")
def test_merged_is_the_forward_in_float64(row: Row, kind: Kind):
    model = kind.build().double()
    lp.apply(model, row.make(kind, adapter_dtype="float64"))
    perturb(model).eval()
    batch = [x.double() if x.is_floating_point() else x for x in kind.batch()]
    with torch.no_grad():
        unmerged = model(*batch)
        lp.merge(model)
        close(model(*batch), unmerged, 1e-11)


@holds("merge_unload")
def test_unload_after_merge_is_a_plain_model_of_the_same_output(row: Row, kind: Kind):
    plain, model = kind.build(), adapted(row, kind)
    unmerged = evaluate(model, kind)
    assert lp.unload(model, merge=True) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    close(evaluate(model, kind), unmerged, 2e-5)


@holds("unload")
def test_unload_gives_the_plain_model_back(row: Row, kind: Kind):
    plain, model = kind.build(), kind.build()
    tied = tied_names(plain)  # frozen, an embedding would leave a head that is tied to it nothing to train
    frozen = next(name for name, _ in plain.named_parameters() if name not in tied)
    plain.get_parameter(frozen).requires_grad_(False)
    model.get_parameter(frozen).requires_grad_(False)
    lp.apply(model, row.make(kind))
    lp.unload(model if row.selects else perturb(model))  # trained base parameters keep their values
    assert classes(model) == classes(plain)
    assert_same_bits(bits(model), bits(plain))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in plain.named_parameters()
    ]
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    assert torch.equal(model(*kind.batch()), plain(*kind.batch()))
    for ours, theirs in zip(model.modules(), plain.modules()):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert getattr(ours, "use_nested_tensor", None) == getattr(theirs, "use_nested_tensor", None)
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)


@holds("idempotent")
def test_applying_again_changes_nothing(row: Row, kind: Kind):
    model = adapted(row, kind)
    before, modules = bits(model), list(model.modules())
    lp.apply(model, row.make(kind))
    assert list(model.modules()) == modules
    assert_same_bits(bits(model), before)


@holds("seeded")
def test_initialisation_depends_on_the_seed_alone(row: Row, kind: Kind, monkeypatch):
    draws = []

    @contextmanager
    def noting_draws(method: lp.PEFTMethod, where: str, seeded_init: Any = lp.PEFTMethod.seeded_init) -> Iterator[None]:
        with seeded_init(method, where):
            before = torch.get_rng_state()
            yield
            draws.append(not torch.equal(torch.get_rng_state(), before))

    monkeypatch.setattr(lp.PEFTMethod, "seeded_init", noting_draws)
    torch.manual_seed(5)
    first = adapted(row, kind, moved=False)
    left = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), left), "injection moved the global random stream"
    torch.manual_seed(6)
    assert_same_bits(lp.adapter_state(adapted(row, kind, moved=False)), lp.adapter_state(first))
    other = lp.adapter_state(adapted(row, kind, moved=False, seed=3))
    assert any(not torch.equal(v, other[k]) for k, v in lp.adapter_state(first).items()) == any(draws)


@holds("two")
def test_two_adapters(row: Row, kind: Kind):
    model = adapted(row, kind)
    alone = evaluate(model, kind)
    lp.apply(model, row.make(kind, name="second"))
    perturb(model, seed=8, name="second")
    both = evaluate(model, kind)
    differ(both, alone)
    with lp.active(model, "default"):
        close(evaluate(model, kind), alone, 1e-6)
    lp.set_active(model, "second")
    second = evaluate(model, kind)
    differ(second, both)
    lp.set_active(model, "second", "default")  # adapters run in the order in which they were applied
    assert torch.equal(evaluate(model, kind), both)


@holds("merge_two")
def test_two_adapters_merge(row: Row, kind: Kind):
    model = adapted(row, kind)
    lp.apply(model, row.make(kind, name="second"))
    both = evaluate(perturb(model, seed=8, name="second"), kind)
    lp.merge(model)
    close(evaluate(model, kind), both, 5e-5)
    lp.unmerge(model)
    reason = ""
    try:  # merged alone, it runs before the first
        lp.merge(model, "second")
    except lp.MergeError as error:
        reason = str(error)
    if reason:
        assert "runs after 'default'" in reason
    close(evaluate(model, kind), both, 5e-5)  # sums and products of diagonal matrices commute
    assert not (reason and row.additive)


@holds("copies")
def test_copies_are_adapted_and_independent(row: Row, kind: Kind):
    model = adapted(row, kind)
    expected = evaluate(model, kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(evaluate(twin, kind), expected)
        perturb(twin, seed=9)
        differ(evaluate(twin, kind), expected)
        assert torch.equal(evaluate(model, kind), expected)
        with lp.disabled(twin):
            assert torch.equal(evaluate(model, kind), expected)


@holds("bfloat16")
def test_cast_down_the_adapters_stay_float32(row: Row, kind: Kind):
    model = adapted(row, kind, moved=False).to(torch.bfloat16)
    adapters = [p for p in adapter_parameters(model).values() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    batch = [x.bfloat16() if x.is_floating_point() else x for x in kind.batch()]
    output = model(*batch)
    assert output.dtype == torch.bfloat16
    output.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters)


@holds("autocast")
def test_autocast(row: Row, kind: Kind):
    model = adapted(row, kind)
    expected = evaluate(model, kind)
    with torch.autocast("cpu", torch.bfloat16):
        close(evaluate(model, kind).float(), expected, 0.15)
        model(*kind.batch()).float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained_parameters(model).values())


@holds("checkpointing")
def test_gradient_checkpointing_equals_plain(row: Row, kind: Kind):
    _same_gradients_checkpointed(row, kind, reentrant=False)


@holds("checkpointing_reentrant")
def test_reentrant_gradient_checkpointing_equals_plain(row: Row, kind: Kind):
    _same_gradients_checkpointed(row, kind, reentrant=True)


def _same_gradients_checkpointed(row: Row, kind: Kind, reentrant: bool) -> None:
    model = adapted(row, kind)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        batch = [x.clone().requires_grad_() if x.is_floating_point() else x for x in kind.batch()]
        torch.manual_seed(3)  # the same dropout
        output = checkpoint(model, *batch, use_reentrant=reentrant) if checkpointed else model(*batch)
        output.pow(2).mean().backward()
        gradients.append({k: p.grad.clone() for k, p in trained_parameters(model).items()})
    for key, gradient in gradients[0].items():  # a forward without a graph may run other kernels: float32's rounding
        close(gradients[1][key], gradient, 1e-5)


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_what_a_method_cannot_do_it_refuses_and_changes_nothing(method: str, kind: str):
    model, plain = KINDS[kind].build(), KINDS[kind].build()
    with pytest.raises(ValueError, match=REFUSED[method, kind][1]):
        lp.apply(model, METHODS[method].make(KINDS[kind]))
    assert classes(model) == classes(plain)
    assert all(p.requires_grad for p in model.parameters())
    assert not list(hosts(model))


def test_every_hole_is_one_of_the_table():
    for method, kind, invariant in [*HOLES, *((*key, ANY) for key in REFUSED)]:
        assert method in {*METHODS, ANY}, method
        assert kind in {*KINDS, ANY}, kind
        assert invariant in {*INVARIANTS, ANY}, invariant


def test_every_method_of_the_package_has_a_row():
    with_row = {type(row.make(KINDS["llama"])) for row in METHODS.values()}
    exported = {getattr(lp, name) for name in lp.__all__ if isinstance(getattr(lp, name), type)}
    assert {m for m in exported if issubclass(m, lp.PEFTMethod) and not inspect.isabstract(m)} <= with_row


def test_kinds_have_three_adapted_layers_or_more():
    for name, kind in KINDS.items():
        assert len(kind.matrices) >= 3, name
        assert isinstance(kind.build(), nn.Module)
