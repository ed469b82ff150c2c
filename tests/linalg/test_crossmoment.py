"""W C from outputs against W times the second moment."""

import pytest
import torch

from tlora.linalg.crossmoment import CrossMoment
from tlora.linalg.moments import SecondMoment


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_it_is_the_weight_times_the_second_moment(padded, bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 10, generator=generator)
    cross, moment = CrossMoment(4, 10), SecondMoment(10, torch.float64)
    for _ in range(3):
        inputs = torch.randn(2, 30, 10, generator=generator) + 5
        mask = torch.rand(2, 30, generator=generator) < 0.7 if padded else None
        if mask is not None:
            inputs[~mask] = torch.nan
        cross.update(inputs, inputs @ weight.T + bias, mask)
        moment.update(inputs, mask)
    exact = weight.double() @ moment.covariance()
    found = cross.weighted(weight).dense()
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    assert (cross.samples, cross.tokens) == (moment.samples, moment.tokens)


def test_asking_twice_gives_the_same():
    cross = CrossMoment(2, 3)
    cross.update(torch.randn(2, 4, 3), torch.randn(2, 4, 2))
    weight = torch.zeros(2, 3)
    assert torch.equal(cross.weighted(weight).dense(), cross.weighted(weight).dense())
