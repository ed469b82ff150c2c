"""What is held when: every moment once, within the budget, and known beforehand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from tlora import TLoraConfig
from tlora.adapter.strategy import choose, packed
from tlora.calibration.accumulators import moment_bytes
from tlora.calibration.streams import stream_bytes


@dataclass(frozen=True)
class Shape:
    name: str
    d_in: int
    d_out: int


def llama(layers: int = 4, hidden: int = 64, wide: int = 160) -> tuple[list[Shape], dict[str, int]]:
    """The seven projections of each layer, and their inputs: q, k, v share one; gate, up one."""
    shapes, sources = [], {}
    for layer, (name, source) in itertools.product(
        range(layers),
        [("q", 0), ("k", 0), ("v", 0), ("o", 1), ("gate", 2), ("up", 2), ("down", 3)],
    ):
        columns = wide if name == "down" else hidden
        shapes.append(Shape(f"{layer}.{name}", columns, hidden))
        sources[f"{layer}.{name}"] = 4 * layer + source
    return shapes, sources


def strategy(**fields: Any) -> Any:
    shapes, sources = llama()
    return choose(shapes, sources, TLoraConfig(r=4, **fields)), shapes, sources


def held(block: tuple[str, ...], shapes: list[Shape], sources: dict[str, int]) -> int:
    columns = {sources[shape.name]: shape.d_in for shape in shapes if shape.name in block}
    return sum(map(moment_bytes, columns.values()))


@pytest.mark.parametrize("budget", [1, 20_000, 130_000, 10**6, 10**9])
def test_blocks_hold_every_moment_once_within_the_budget(budget):
    found, shapes, sources = strategy(memory_budget=budget, covariance="exact")
    assert sorted(itertools.chain(*found.blocks)) == sorted(shape.name for shape in shapes)
    sizes = [held(block, shapes, sources) for block in found.blocks]
    assert found.held == max(sizes)
    assert found.held <= max(budget, moment_bytes(160))
    assert sum(sizes) == found.total  # so no input is in two blocks
    assert found.passes == len(found.blocks)


def test_the_first_block_is_of_the_last_modules_and_the_others_follow_the_model():
    found, shapes, _ = strategy(memory_budget=130_000, covariance="exact")
    order = {shape.name: index for index, shape in enumerate(shapes)}
    first, *others = [[order[name] for name in block] for block in found.blocks]
    assert first[-1] == len(shapes) - 1
    assert list(itertools.chain(*others, first)) == list(range(len(shapes)))


def test_without_a_budget_everything_is_held_in_one_pass():
    found, _, _ = strategy()
    assert (len(found.blocks), found.passes, found.held) == (1, 1, found.total)
    assert "all at once; it reads the samples once and" in found.summary()


def test_auto_streams_what_exceeds_the_budget_alone():
    budget = moment_bytes(64)
    found, shapes, _ = strategy(memory_budget=budget)
    assert found.streamed == {shape.name for shape in shapes if shape.d_in == 160}
    assert not found.streamed & set(itertools.chain(*found.blocks))
    assert found.held <= max(budget, stream_bytes(160, 4))
    assert f"streams those of {len(found.streamed)} modules" in found.summary()


@pytest.mark.parametrize("budget", [None, 10**5])
def test_streaming_all_takes_three_passes_a_run(budget):
    found, shapes, _ = strategy(memory_budget=budget, covariance="streamed")
    assert found.blocks == ()
    assert len(found.streamed) == len(shapes)
    assert found.passes == 1 + 3 * len(found.streams)
    assert (len(found.streams) > 1) == (budget is not None)


def test_a_random_basis_needs_one_pass_and_nothing_held():
    found, _, _ = strategy(basis="random", memory_budget=1)
    assert (found.passes, found.held) == (1, 0)
    assert found.summary().startswith("calibration needs no second moments")


def test_packing_keeps_the_order_and_a_piece_beyond_the_budget_alone():
    pieces = [("a", 2), ("b", 3), ("c", 9), ("d", 1), ("e", 4)]
    assert packed(pieces, 5) == [(["a", "b"], 5), (["c"], 9), (["d", "e"], 5)]
    assert packed(pieces, None) == [(list("abcde"), 19)]


GRADIENTS = ["gradient", "gradient-covariance", "gradient-moment", "weight-gradient-moment"]


def bytes_of(block: Any, shapes: list[Shape], sources: dict[str, int], basis: str) -> int:
    own = [shape for shape in shapes if shape.name in block]
    total = held(block, shapes, sources) if basis == "gradient-covariance" else 0
    if basis in ("gradient", "gradient-covariance"):
        return total + sum(4 * shape.d_in * shape.d_out for shape in own)
    return sum(4 * shape.d_in**2 for shape in own)


@pytest.mark.parametrize("basis", GRADIENTS)
@pytest.mark.parametrize("budget", [1, 50_000, 10**9])
def test_gradients_count_for_each_module_whatever_it_shares(basis, budget):
    found, shapes, sources = strategy(basis=basis, memory_budget=budget)
    assert sorted(itertools.chain(*found.blocks)) == sorted(shape.name for shape in shapes)
    sizes = [bytes_of(set(block), shapes, sources, basis) for block in found.blocks]
    assert found.held == max(sizes)
    assert sum(sizes) == found.total
    # Nothing streams; what exceeds the budget alone has a block of its own.
    assert (found.streamed, found.passes) == (frozenset(), len(found.blocks))
    several = [block for block in found.blocks if len({sources[name] for name in block}) > 1]
    assert all(bytes_of(set(block), shapes, sources, basis) <= budget for block in several)
    assert ("gradient" in found.summary()) and ("mean gradients" in found.summary()) == (
        basis in ("gradient", "gradient-covariance")
    )


def test_a_first_run_takes_less_and_may_be_empty():
    pieces = [("a", 3), ("b", 2), ("c", 4), ("d", 1)]
    assert packed(pieces, 6, 3) == [(["a"], 3), (["b", "c"], 6), (["d"], 1)]
    assert packed(pieces, 6, 2) == [([], 0), (["a", "b"], 5), (["c", "d"], 5)]
    assert packed(pieces, 6) == packed(pieces, 6, 6) == [(["a", "b"], 5), (["c", "d"], 5)]
    assert packed(pieces, 2, 2)[0] == (["a"], 3)  # a piece at least, where the first gets no less
    assert packed([], 6, 2) == []
