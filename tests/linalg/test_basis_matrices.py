"""The matrices of bases against dense algebra, wider than a block of the second moment."""

from __future__ import annotations

import pytest
import torch

from support import distance
from tlora.linalg.bases import half_weighted, moment_itself
from tlora.linalg.gradients import add_gradient, squared_norm
from tlora.linalg.moments import SecondMoment

WIDE = 300


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[90, 700], ids=["rows", "formed"])
def moment(request):
    made = SecondMoment(WIDE)
    made.update(gaussian(3, request.param // 3, WIDE) * torch.linspace(0.1, 3, WIDE) + 1)
    assert (made.rows is None) is (request.param > WIDE)
    return made


def test_the_moment_itself(moment):
    like = torch.zeros(1, dtype=torch.float64)
    found = moment_itself(moment, like)
    assert found.shape == (WIDE, WIDE)
    assert found.dense().dtype == torch.float64
    assert distance(found.dense(), moment.covariance()) < 1e-6
    assert torch.equal(found.dense(), moment_itself(moment, like).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_squares_to_the_moment(moment, dtype):
    weight, covariance = gaussian(40, WIDE, seed=1).to(dtype), moment.covariance().double()
    found = half_weighted(weight, moment)
    assert found.shape == (40, WIDE)
    dense = found.dense()
    assert dense.dtype == dtype
    assert distance(dense @ dense.T, weight.double() @ covariance @ weight.double().T) < 1e-4
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    assert distance(dense, weight.double() @ root) < 1e-3


def test_a_module_that_saw_nothing_has_matrices_of_zeros():
    empty, weight = SecondMoment(6), gaussian(4, 6)
    assert half_weighted(weight, empty).dense().equal(torch.zeros(4, 6))
    assert moment_itself(empty, weight).dense().equal(torch.zeros(6, 6))


def test_rows_as_they_are_make_the_plain_moment():
    made, rows = SecondMoment(7), gaussian(20, 7) + 3
    for part in rows.split(4):
        made.add_rows(part)
    made.samples = 5
    expected = rows.double().T @ rows.double() / 5
    assert made.tokens == 20
    assert distance(made.covariance(), expected) < 1e-6
    # No mean is kept, so there is none to add.
    assert distance(made.uncentered(), expected) < 1e-6


@pytest.mark.parametrize("tokens", [3, 500])
def test_squared_norms_are_those_of_the_gradient_formed(tokens):
    calls = [(gaussian(tokens, 30, seed=s), gaussian(tokens, 20, seed=s + 9)) for s in (1, 2)]
    whole = sum(delta.double().T @ x.double() for delta, x in calls)
    found = squared_norm([[], calls, calls[:1]])
    assert found[0] == 0
    assert found[1].item() == pytest.approx(whole.square().sum().item(), rel=1e-5)
    first = calls[0][0].double().T @ calls[0][1].double()
    assert found[2].item() == pytest.approx(first.square().sum().item(), rel=1e-5)


def test_autocast_rounds_no_gradient():
    delta, x = gaussian(11, 5), gaussian(11, 6, seed=1)
    total = torch.ones(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        add_gradient(total, [[(delta, x)]], [1.0])
    assert distance(total, 1 + delta.double().T @ x.double()) < 1e-6
