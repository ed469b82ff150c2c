"""The stages that are timed are functions of the library, and each moment counts once."""

from __future__ import annotations

import pytest
import torch

from tlora import TLoraConfig, get_tlora_model


@pytest.fixture
def stagetimers(script):
    script("cost", "measure")
    return script("cost", "stagetimers")


@pytest.fixture
def samples():
    ids = torch.randint(3, 60, (8, 20), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "labels": part} for part in ids.split(4)]


def test_every_stage_runs_and_each_second_counts_once(
    stagetimers, tiny_llama, samples, monkeypatch
):
    ticks = iter(range(10**9))
    monkeypatch.setattr(stagetimers.time, "perf_counter", lambda: float(next(ticks)))
    with stagetimers.Timers("cpu") as timers:
        start = stagetimers.time.perf_counter()
        get_tlora_model(tiny_llama(), TLoraConfig(r=4), samples, progress=False)
        total = stagetimers.time.perf_counter() - start
    assert set(timers.seconds) == set(stagetimers.STAGES)
    assert all(seconds > 0 for seconds in timers.seconds.values())
    assert sum(timers.seconds.values()) < total


def test_a_stage_inside_another_counts_for_itself_alone(stagetimers, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stagetimers.time, "perf_counter", lambda: clock[0])
    timers = stagetimers.Timers("cpu")

    def wait(seconds, then=lambda: None):
        clock[0] += seconds
        then()
        clock[0] += seconds

    inner = timers._timed("moments", "inner", lambda: wait(1.0))
    timers._timed("W C", "outer", lambda: wait(10.0, inner))()
    wait(100.0)
    assert timers.seconds["moments"] == 2.0
    assert timers.seconds["W C"] == 20.0
    assert sum(timers.seconds.values()) == 22.0
    assert timers.calls == {"inner": 1, "outer": 1}


def test_the_library_is_as_before_afterwards(stagetimers):
    from tlora.adapter import blocks, planning, solve

    holders, before = (solve, planning, blocks), solve.solve
    with stagetimers.Timers("cpu"):
        assert all(module.solve is solve.solve is not before for module in holders)
    assert all(module.solve is before for module in holders)


def test_a_name_that_is_gone_is_an_error(stagetimers, monkeypatch):
    monkeypatch.setitem(stagetimers.STAGES, "moments", ("tlora.linalg.moments:no_such_name",))
    with pytest.raises(AttributeError, match="no_such_name"), stagetimers.Timers("cpu"):
        pass


def test_operations_of_a_small_model_are_those_counted_by_hand(script):
    script("cost", "measure")
    flops, models = script("cost", "flops"), script("cost", "models")
    shape = models.Shape(hidden=4, intermediate=8, layers=1, vocabulary=10, samples=2, tokens=3)
    ranks = {"base.layers.0.mlp.down_proj": 1}
    found = flops.operations(shape, ranks, by_outputs=False)
    # 6 tokens; weights 4 of 4 x 4, 3 of 4 x 8, and the head of 4 x 10.
    assert found["passes"] == 4 * 6 * (4 * 16 + 3 * 32 + 40) + 3 * 4 * 6 * 3 * 4
    # More tokens than half of the columns for all inputs: three of 4 columns and one of 8.
    assert found["moments"] == 6 * (3 * 16 + 64)
    assert found["sensitivities"] == 2 * (4 * 16 + 3 * 32) * (6 + 2)
    assert found["W C"] == 2 * (4 * 16 * 4 + 2 * 32 * 4 + 32 * 8)
    assert found["factorizations"] == 4 * 4 * 8 * 4 + 8 * 4**3
    found = flops.operations(shape, ranks, by_outputs=True)
    assert found["moments"] == 6 * 3 * 16
    assert found["W C"] == 2 * (4 * 16 * 4 + 2 * 32 * 4 + 32 * 6)
