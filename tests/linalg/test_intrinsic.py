import math

import pytest
import torch

from tlora.linalg.intrinsic import two_nn


def by_hand(points):
    """The definition, point by point."""
    ratios = []
    for point in points:
        distances = sorted(math.dist(point, other) for other in points if other is not point)
        ratios.append(math.log(distances[1] / distances[0]))
    ratios.sort()
    kept = ratios[: int(0.9 * len(ratios))]
    heights = [-math.log(1 - i / len(ratios)) for i in range(1, len(kept) + 1)]
    return sum(x * y for x, y in zip(kept, heights, strict=True)) / sum(x * x for x in kept)


def test_it_is_the_slope_of_the_definition():
    points = torch.randn(23, 5, generator=torch.Generator().manual_seed(1))
    assert two_nn(points) == pytest.approx(by_hand(points.double().tolist()))
    assert two_nn(torch.cat([points, points[:4]])) == pytest.approx(two_nn(points))
    assert two_nn(7 * points + 3) == pytest.approx(two_nn(points), rel=1e-4)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_it_finds_the_dimension_of_a_curved_surface(dimension):
    generator = torch.Generator().manual_seed(3)
    inside = torch.rand(600, dimension, generator=generator)
    surface = torch.cat([inside, inside.square(), inside.sin()], dim=1)
    assert two_nn(surface) == pytest.approx(dimension, rel=0.15)


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        (torch.ones(9, 2), r"too few distinct points \(1\)"),
        (torch.eye(4), "equally far away"),
    ],
)
def test_points_without_a_dimension_are_refused(points, fault):
    with pytest.raises(ValueError, match=fault):
        two_nn(points)
