"""The benchmark's byte counter is exact, and its script runs; no timing is tested."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is not installed with the package

from benchmarks import step
from benchmarks.measure import Saved, paired_ratio, saved_bytes
from benchmarks.methods import METHODS
from benchmarks.page import markdown

ROWS, WIDTH, OUT = 3, 5, 7
FLOAT = 4


class Square(torch.autograd.Function):
    """Saves its input where saved-tensor hooks do not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x * 1.0
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad


@pytest.fixture
def linear():
    return nn.Linear(WIDTH, OUT, bias=False)


@pytest.fixture
def x():
    return torch.randn(ROWS, WIDTH)


def test_relu_of_a_product_keeps_the_input_and_the_output(linear, x):
    saved = saved_bytes(lambda: torch.relu(x @ linear.weight.T).sum(), linear)
    assert saved == Saved(activations=FLOAT * ROWS * (WIDTH + OUT), batch=0)


def test_batch_is_reported_apart(linear, x):
    saved = saved_bytes(lambda: torch.relu(x @ linear.weight.T).sum(), linear, [x])
    assert saved == Saved(activations=FLOAT * ROWS * OUT, batch=FLOAT * ROWS * WIDTH)


def test_storage_shared_by_two_nodes_counts_once(linear, x):
    def forward():
        h = linear(x)
        return (h.sin() + h.view(-1).cos().view_as(h)).sum()

    assert saved_bytes(forward, linear, [x]).activations == FLOAT * ROWS * OUT


def test_frozen_layer_keeps_only_its_parameter(linear, x):
    linear.requires_grad_(False)
    x.requires_grad_()
    assert saved_bytes(lambda: linear(x).sum(), linear) == Saved(0, 0)
    assert saved_bytes(lambda: linear(x).sum()).activations == FLOAT * WIDTH * OUT


def test_view_keeps_its_whole_storage(x):
    x.requires_grad_()
    assert saved_bytes(lambda: (x * 2)[:1].sin().sum()).activations == FLOAT * ROWS * WIDTH


def test_what_is_freed_before_the_end_of_forward_does_not_count(linear, x):
    def forward():
        torch.relu(x @ linear.weight.T)
        return linear(x).sum()

    assert saved_bytes(forward, linear, [x]) == Saved(0, FLOAT * ROWS * WIDTH)


def test_attributes_of_a_custom_function_count(x):
    x.requires_grad_()
    assert saved_bytes(lambda: Square.apply(x).sum()).activations == FLOAT * ROWS * WIDTH


def test_paired_ratio_divides_out_drift():
    assert paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]).median == 2


@pytest.mark.parametrize("case", sorted(step.CASES))
def test_every_row_is_fair_and_keeps_no_more_than_peft(case, tmp_path):
    if case != "resnet":
        pytest.importorskip("transformers")
    page, numbers = tmp_path / "results" / "page.md", tmp_path / "numbers.json"
    line = ["--case", case, "--size", "tiny", "--repeats", "1", "--warmup", "0", "--rank", "1"]
    # every row is comparable, because otherwise the status is 1
    assert step.main([*line, "--markdown", str(page), "--json", str(numbers)]) == 0

    rows = json.loads(numbers.read_text())["cases"][case]["rows"]
    assert set(rows) == {name for name, method in METHODS.items() if case in method.on}
    for name, row in rows.items():
        assert row["floor"]["trainable"] == 0
        assert len(row["ours"]["times"]) == 1
        assert f"| {name} |" in page.read_text()
        theirs = row.get("peft")
        if theirs and not theirs["skipped"] and "saved" not in METHODS[name].why:
            assert row["ours"]["saved"]["activations"] <= theirs["saved"]["activations"], name


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    measured, measure = [], step.measure
    monkeypatch.setattr(step, "measure", lambda name, *rest: measured.append(name) or measure(name, *rest))
    line = [
        "--case",
        "resnet",
        "--size",
        "tiny",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--json",
        str(tmp_path / "run.json"),
    ]
    step.main([*line, "--method", "BitFit"])
    step.main([*line, "--method", "BitFit", "SSF"])
    assert measured == ["BitFit", "SSF"]
    with pytest.raises(SystemExit, match="other settings"):
        step.main([*line, "--rank", "3"])


def _run(**values):
    return step.Run(**{"trainable": 10, "adapted": ["a"], "loss": 1.0, **values})


def test_unequal_variants_are_named():
    row = {"floor": _run(), "peft": _run(), "ours": _run(trainable=12, adapted=["a", "b"])}
    count, targets = step.faults("LoRA", row)
    assert "12 trainable" in count
    assert targets.endswith(": b")
    row = {"floor": _run(), "ours": _run(loss=2.0)}
    (loss,) = step.faults("LoRA", row)
    assert "first loss 2.0000" in loss


def test_rows_slower_or_larger_than_peft_show_their_reason():
    floor = _run(times=[1.0] * 4, saved=Saved(100))
    dear = {
        "floor": floor,
        "peft": _run(times=[1.0] * 4, saved=Saved(100)),
        "ours": _run(times=[2.0] * 4, saved=Saved(150)),
    }
    about = {
        "command": "",
        "hardware": "",
        "versions": {},
        "settings": dict.fromkeys(step.SETTINGS) | {"clock": "wall"},
    }
    page = markdown(about, {"llama": ("llama", {"PiSSA": dear})}, "", step.faults)
    assert "| PiSSA | **2.00 (1.00)** | **1.50 (1.00)** |" in page
    assert "- PiSSA, slower on llama: no reason known." in page
    assert f"- PiSSA, larger on llama: {METHODS['PiSSA'].why['saved']}" in page
