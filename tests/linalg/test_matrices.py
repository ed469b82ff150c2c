"""What tensors hold that is not finite."""

import math

import pytest
import torch

from tlora.linalg.matrices import not_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(dtype, value):
    tensors = {
        "good": torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype),
        "first": torch.zeros(3, 4, dtype=dtype).index_fill(0, torch.tensor([2]), value),
        "empty": torch.empty(0, dtype=dtype),
        "second": torch.tensor(value, dtype=dtype, requires_grad=True),
        "whole": torch.arange(3),
        "packed": torch.tensor([1.0]).to(torch.float8_e4m3fn),
    }
    assert not_finite(tensors) == ["first", "second"]
    assert not_finite({}) == []
