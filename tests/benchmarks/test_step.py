"""The benchmark's counter is exact, and its script runs; nothing here looks at a clock."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is beside the package, not in it

from benchmarks import step
from benchmarks.measure import Saved, paired_ratio, saved_bytes

ROWS, WIDTH, OUT = 3, 5, 7
FLOAT = 4


class Square(torch.autograd.Function):
    """Keeps its input where the hooks do not see it."""

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
def test_script_runs(case, tmp_path):
    if case != "resnet":
        pytest.importorskip("transformers")
    page, numbers = tmp_path / "results" / "page.md", tmp_path / "numbers.json"
    line = ["--case", case, "--size", "tiny", "--repeats", "2", "--warmup", "1", "--rank", "2"]
    assert step.main([*line, "--markdown", str(page), "--json", str(numbers)]) == 0

    (runs,) = json.loads(numbers.read_text())["cases"].values()
    floor = next(run for run in runs if run["name"] == "floor")
    assert floor["trainable"] == 0
    for run in runs:
        if not run["skipped"]:
            assert len(run["times"]) == 2
            assert run["method"] is None or run["adapted"]
        assert f"| {run['name']} |" in page.read_text()


def test_unequal_variants_are_named():
    theirs = step.Run("peft LoRA", "LoRA", trainable=10, adapted=["a"], loss=1.0)
    ours = step.Run("ours LoRA", "LoRA", trainable=12, adapted=["a", "b"], loss=1.0)
    count, targets = step.faults([theirs, ours])
    assert "12 trainable" in count
    assert targets.endswith(": b")
