"""Test the check for NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.ops.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_is_found(dtype: torch.dtype, value: float):
    tensor = torch.linspace(-1, 1, 101).to(dtype)
    assert is_finite(tensor)
    tensor[70] = torch.tensor(value).to(dtype)
    assert not is_finite(tensor)


def test_an_empty_tensor_is_finite():
    assert is_finite(torch.empty(0, 3))
