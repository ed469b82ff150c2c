"""What a way costs, and that "auto" takes the cheapest within the budget."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tlora import TLoraConfig
from tlora.adapter import strategy
from tlora.adapter.costs import Work, multiply_adds, work_of
from tlora.adapter.strategy import Strategy, choose
from tlora.calibration.accumulators import moment_bytes
from tlora.calibration.streams import stream_bytes
from tlora.calibration.weights import Target

GIB = 2**30


class Shape(NamedTuple):
    name: str
    d_in: int
    d_out: int


def decoder(
    layers: int, hidden: int, wide: int, kv: int
) -> tuple[list[Shape], dict[str, int], dict[str, int]]:
    """A Llama's seven projections a layer, their inputs, and the parameters up to each."""
    shapes, sources, through, total = [], {}, {}, 32_000 * hidden
    kinds = [("q", hidden, hidden, 0), ("k", hidden, kv, 0), ("v", hidden, kv, 0)]
    kinds += [("o", hidden, hidden, 1), ("gate", hidden, wide, 2), ("up", hidden, wide, 2)]
    kinds += [("down", wide, hidden, 3)]
    for layer, (kind, columns, rows, source) in itertools.product(range(layers), kinds):
        name = f"{layer}.{kind}"
        shapes.append(Shape(name, columns, rows))
        total += rows * columns
        sources[name], through[name] = 4 * layer + source, total
    return shapes, sources, through


def test_the_cost_of_a_way_is_that_of_its_passes_products_and_factorizations():
    shapes = [Shape("a", 100, 50), Shape("b", 100, 20), Shape("c", 300, 60)]
    work = Work(200, {"a": 1000, "b": 2000, "c": 5000}, rank=4)
    # Exact: C of a and b once, of 200 tokens; c has fewer tokens than columns, so C is not formed.
    formed = 200 * 100**2 // 2
    a = 50 * 100 * 100 + 8 * 50 * 100 * (4 + 32)
    b = 20 * 100 * 100 + 8 * 20 * 100 * (4 + 32)
    c = 60 * 300 * 200 + 8 * 60 * 300 * (4 + 32)
    exact = multiply_adds(shapes, {"a": 0, "b": 0, "c": 1}, [["c"], ["a", "b"]], [], work)
    assert exact == 200 * 2000 + formed + a + b + c
    # Streamed: three passes, each with two products with C's factors and two with W, l = 4 + 32.
    streamed = multiply_adds(shapes, {"a": 0, "b": 0, "c": 1}, [["a", "b"]], [["c"]], work)
    assert streamed == 3 * 200 * 5000 + 3 * 2 * 300 * 36 * (200 + 60) + formed + a + b


def test_llama_2_7b_in_3_gib_is_exact_in_blocks():
    shapes, sources, through = decoder(32, 4096, 11008, 4096)
    config = TLoraConfig(r=128, memory_budget="3GiB")
    found = choose(shapes, sources, config, Work(32 * 512, through, 128))
    assert found.streamed == frozenset()
    total = 32 * (3 * moment_bytes(4096) + moment_bytes(11008))
    assert found.total == total
    assert math.ceil(total / (3 * GIB)) <= len(found.blocks) <= math.ceil(total / (3 * GIB)) + 1


def test_llama_2_70b_in_1_gib_streams_the_widest_alone():
    shapes, sources, through = decoder(80, 8192, 28672, 1024)
    config = TLoraConfig(r=128, memory_budget="1GiB")
    found = choose(shapes, sources, config, Work(32 * 512, through, 128))
    assert moment_bytes(28672) > GIB
    assert found.streamed == {f"{layer}.down" for layer in range(80)}
    # 80 x 2 blocks of 28672 x 512 take 8.75 GiB: nine runs.
    assert len(found.streams) == 9
    assert found.held <= GIB


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_a_module_beyond_the_budget_is_streamed_whatever_that_costs(tokens):
    shapes = [Shape("narrow", 64, 64), Shape("wide", 20_000, 4)]
    work = Work(tokens, {"narrow": 4096, "wide": 10**12}, rank=4)
    found = choose(shapes, {}, TLoraConfig(r=4, memory_budget=moment_bytes(19_999)), work)
    assert "wide" in found.streamed
    assert found.held <= moment_bytes(19_999)


@pytest.mark.parametrize("fields", [{}, {"memory_budget": None}])
def test_without_a_budget_everything_is_exact_at_once(fields):
    shapes, sources, through = decoder(2, 64, 160, 64)
    # Streaming would cost next to nothing.
    work = Work(10**6, dict.fromkeys(through, 0), rank=4)
    found = choose(shapes, sources, TLoraConfig(r=4, **fields), work)
    assert (len(found.blocks), found.streams) == (1, ())


def ways(shapes: Any, sources: Any, config: TLoraConfig) -> list[Strategy]:
    """Every way that streams the modules from some width on, and those that have to be."""
    budget = config.memory_budget_bytes or 0
    forced = {shape.name for shape in shapes if moment_bytes(shape.d_in) > budget}
    widths = {shape.d_in for shape in shapes} | {10**9}
    wanted = [{s.name for s in shapes if s.d_in >= width} | forced for width in widths]
    return [strategy._way(shapes, sources, config, frozenset(names)) for names in wanted]


@pytest.mark.parametrize("seed", range(60))
def test_no_way_is_much_cheaper_than_the_one_chosen_and_it_keeps_the_budget(seed):
    draw = random.Random(seed)
    dims = [draw.randrange(16, 4096) for _ in range(3)]
    shapes, sources, through = decoder(draw.randrange(1, 6), *dims)
    rank = draw.randrange(1, 64)
    config = TLoraConfig(r=rank, memory_budget=draw.randrange(10**4, 10**9))
    work = Work(draw.randrange(10, 10**5), through, rank)

    def cost(way: Strategy) -> int:
        return multiply_adds(shapes, sources, way.blocks, way.streams, work)

    found = choose(shapes, sources, config, work)
    each = ways(shapes, sources, config)
    exact = min(each, key=lambda way: len(way.streamed))
    cheapest = min(map(cost, each))
    assert cost(found) == (cost(exact) if cost(exact) <= 1.2 * cheapest else cheapest)
    single = max(stream_bytes(shape.d_in, rank) for shape in shapes)
    assert found.held <= max(config.memory_budget_bytes or 0, single)
    names = sorted(itertools.chain(*found.blocks, *found.streams))
    assert names == sorted(shape.name for shape in shapes)


def test_the_shares_of_the_model_are_counted_in_its_order_by_shape():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6, bias=False), nn.Linear(6, 3))
    # As a 4-bit weight is stored: two values a byte.
    model[1].weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    targets = [Target("1", model[1], 4, 6), Target("2", model[2], 6, 3)]
    work = work_of(model, targets, TLoraConfig(r=2), tokens=7)
    assert work == Work(7, {"1": 40 + 24, "2": 40 + 24 + 18}, 2)
