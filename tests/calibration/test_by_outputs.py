"""Modules whose W C comes from their outputs: which ones, and that it is W C."""

import pytest
import torch
from torch import nn

from tlora import TLoraConfig
from tlora.calibration.accumulators import MomentAccumulator, cheaper_by_outputs
from tlora.calibration.collector import Collector
from tlora.calibration.probe import probing
from tlora.calibration.targets import find_targets
from tlora.linalg.crossmoment import CrossMoment


class Narrowing(nn.Module):
    """`down` alone reads its input, `left` and `right` share one; all have few outputs."""

    def __init__(self, overwrites=False):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 20)
        self.left, self.right = nn.Linear(20, 5), nn.Linear(20, 5)
        self.down = nn.Linear(20, 6)
        self.overwrites = overwrites

    def forward(self, x):
        h = self.up(x).relu()
        y = self.down(self.left(h).repeat(1, 1, 4) + self.right(h).repeat(1, 1, 4))
        if self.overwrites:
            y.mul_(3)
        return {"loss": y.square().mean(), "y": y}


CONFIG = TLoraConfig(r=2, target_modules=["left", "right", "down"], allocate_rank=False)
BATCHES = [{"x": torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(s))} for s in (1, 2)]


def collected(model, config=CONFIG, by_outputs=True, context=torch.no_grad):
    targets = find_targets(model, config)
    names = cheaper_by_outputs(targets, config) if by_outputs else []
    accumulator = MomentAccumulator((), names)
    reads = Collector(model, targets, accumulator, None)
    with probing(model), context():
        for batch in BATCHES:
            reads.add(batch)
    return accumulator


@pytest.mark.parametrize("overwrites", [False, True])
def test_w_c_is_that_of_the_inputs_even_if_the_model_overwrites_the_outputs(overwrites):
    model = Narrowing(overwrites)
    found, plain = collected(model), collected(model, by_outputs=False)
    kinds = {name: type(found.moment(name)) is CrossMoment for name in ("left", "right", "down")}
    assert kinds == {"left": False, "right": False, "down": True}
    for name in kinds:
        weight = model.get_submodule(name).weight.detach()
        exact = plain.moment(name).weighted(weight.double()).dense()
        product = found.moment(name).weighted(weight).dense()
        assert (product - exact).norm() <= 1e-5 * exact.norm()


def test_outputs_that_autocast_rounds_are_not_used():
    with torch.autocast("cpu", torch.bfloat16):
        found = collected(Narrowing())
    assert type(found.moment("down")) is not CrossMoment


@pytest.mark.parametrize(
    "fields", [{"whiten": True}, {"basis": "covariance"}, {"basis": "gradient-covariance"}]
)
def test_where_c_itself_is_wanted_no_output_is_used(fields):
    config = TLoraConfig(r=2, target_modules=["down"], **fields)
    assert cheaper_by_outputs(find_targets(Narrowing(), config), config) == []


def test_only_plain_float32_layers_with_few_outputs_qualify():
    model = Narrowing()
    config = TLoraConfig(r=2, target_modules=["up", "left", "down"])
    names = {t.name for t in find_targets(model, config)}
    assert names == {"up", "left", "down"}
    assert set(cheaper_by_outputs(find_targets(model, config), config)) == {"left", "down"}
    model.left.bfloat16()
    assert cheaper_by_outputs(find_targets(model, config), config) == ["down"]


def test_reduced_precision_products_qualify_none():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert cheaper_by_outputs(find_targets(Narrowing(), CONFIG), CONFIG) == []
    finally:
        torch.set_float32_matmul_precision(before)
