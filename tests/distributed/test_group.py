"""Two processes measure and plan what one does, however samples and weights are dealt out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from processes import Processes

from support import causal_samples, distance, padded
from tlora import AdapterPlan, Calibration, TLoraConfig, calibrate, plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.training.divergence import RECOVERY_STEPS

EVEN = [[[0, 1], [2]], [[3, 4]]]
UNEVEN = [[[0], [1], [2, 3], [4]], []]


@pytest.fixture(scope="session")
def folder(saved: Any, tiny_llama: Any) -> str:
    return saved(tiny_llama())


@pytest.fixture(scope="session")
def alone(folder: str) -> Callable[..., tuple[Calibration, AdapterPlan]]:
    """Calibrate and plan in this process."""

    def run(fields: dict[str, Any], samples: Any = None) -> tuple[Calibration, AdapterPlan]:
        config = TLoraConfig(**fields)
        model = jobs.load(folder)
        stats = calibrate(model, [padded(samples or causal_samples())], config)
        return stats, plan(model, stats, config)

    return run


def assert_same_statistics(found: Calibration, expected: Calibration, times: int = 1) -> None:
    assert list(found.modules) == list(expected.modules)
    assert found.samples == times * expected.samples
    groups: dict[int, set[int]] = {}
    for name, module in found.modules.items():
        other = expected.modules[name]
        assert module.tokens == times * other.tokens, name
        assert module.sensitivity == pytest.approx(other.sensitivity, rel=1e-4), name
        assert distance(module.covariance(), other.covariance()) < 1e-5, name
        assert distance(module.uncentered(), other.uncentered()) < 1e-5, name
        groups.setdefault(module.moment_id, set()).add(other.moment_id)
    assert all(len(others) == 1 for others in groups.values())
    assert len(groups) == len({m.moment_id for m in expected.modules.values()})


def assert_same_plan(found: AdapterPlan, expected: AdapterPlan) -> None:
    """Equal up to the rounding of the statistics: processes, scales, subspaces."""
    for name, module in found.modules.items():
        other = expected.modules[name]
        assert (module.rank, module.d_in, module.d_out) == (other.rank, other.d_in, other.d_out)
        assert module.scale == pytest.approx(other.scale, rel=1e-4), name
        overlap = (module.lora_A @ other.lora_A.T).square().sum() / max(1, other.rank)
        assert overlap == pytest.approx(1.0, abs=1e-3), name


def both(kind: Any, out: Path, name: str) -> list[Any]:
    return [kind.load(out / f"{name}-{rank}.safetensors") for rank in (0, 1)]


def assert_equal_to_the_bit(left: AdapterPlan, right: AdapterPlan) -> None:
    assert list(left.modules) == list(right.modules)
    for name, module in left.modules.items():
        other = vars(right.modules[name])
        assert torch.equal(module.lora_A, other["lora_A"]), name
        assert {k: v for k, v in vars(module).items() if k != "lora_A"} == {
            k: v for k, v in other.items() if k != "lora_A"
        }


@pytest.mark.parametrize(
    ("engine", "dealt"),
    [("plain", UNEVEN), ("ddp", EVEN), ("fsdp", EVEN), ("fsdp", UNEVEN[::-1])],
    ids=str,
)
def test_statistics_and_plan_are_those_of_one_process(
    engine: str, dealt: Any, processes: Processes, folder: str, alone: Any, tmp_path: Path
) -> None:
    stats, expected = alone({"r": 2})
    processes.run(jobs.measure, folder, engine, dealt, {"r": 2}, str(tmp_path))
    for found in both(Calibration, tmp_path, "stats"):
        assert_same_statistics(found, stats)
    first, second = both(AdapterPlan, tmp_path, "plan")
    assert_equal_to_the_bit(first, second)
    assert_same_plan(first, expected)


@pytest.mark.parametrize(
    "case",
    [("plain", "gradient-covariance", EVEN), ("fsdp", "weight-gradient-moment", UNEVEN)],
    ids=["G", "N"],
)
def test_gradients_of_all_processes_add_up(case, processes, folder, alone, tmp_path):
    engine, basis, dealt = case
    fields = {"r": 2, "basis": basis, "sensitivity_rule": "fisher"}
    stats, expected = alone(fields)
    processes.run(jobs.measure, folder, engine, dealt, fields, str(tmp_path))
    for found in both(Calibration, tmp_path, "stats"):
        for name, module in found.modules.items():
            other = stats.modules[name]
            assert module.fisher == pytest.approx(other.fisher, rel=1e-4), name
            if basis == "gradient-covariance":
                assert distance(module.gradient, other.gradient) < 1e-5, name
                assert distance(module.covariance(), other.covariance()) < 1e-5, name
            else:
                moments = (module.gradient_moment, other.gradient_moment)
                assert distance(*(moment.covariance() for moment in moments)) < 1e-5, name
    first, second = both(AdapterPlan, tmp_path, "plan")
    assert_equal_to_the_bit(first, second)
    assert_same_plan(first, expected)


@pytest.mark.parametrize("engine", ["fsdp"])
@pytest.mark.parametrize(
    "fields",
    [
        {"memory_budget": 1, "covariance": "exact"},
        {"memory_budget": 1, "covariance": "exact", "allocate_rank": False, "rank_min": 0},
        {"covariance": "streamed"},
        {"memory_budget": 3000, "basis": "gradient"},
    ],
    ids=["blocks", "uniform", "streamed", "gradients"],
)
def test_blocks_and_streams_plan_what_one_plans(engine, fields, processes, folder, tmp_path):
    fields = {"r": 2, **fields}
    expected = plan_in_blocks(jobs.load(folder), [padded(causal_samples())], TLoraConfig(**fields))
    passes = processes.run(jobs.planned, folder, engine, UNEVEN, fields, str(tmp_path))
    assert passes == [expected.info["passes"]] * 2
    first, second = both(AdapterPlan, tmp_path, "plan")
    assert_equal_to_the_bit(first, second)
    assert_same_plan(first, expected)


def test_each_module_is_solved_once_and_one_sharded_weight_is_held_at_a_time(processes, folder):
    (first, alive), (second, _) = processes.run(jobs.solved, folder, EVEN)
    names = [name for name, _ in jobs.load(folder).named_modules() if name.endswith("_proj")]
    assert sorted(first + second) == sorted(names)
    assert abs(len(first) - len(second)) <= 1
    assert set(alive) == {1}


@pytest.mark.parametrize("engine", ["fsdp"])
def test_a_bad_sample_of_one_process_is_raised_on_all_and_named(engine, processes, folder):
    said = processes.run(jobs.failure, folder, engine, [[[0, 1], [2]], [[3], [4]]], (4,))
    assert said[0] == said[1]
    kind, sentence = said[0]
    assert kind == "CalibrationError"
    assert sentence.startswith("process 1: sample 1 (counted from 0) has no label that counts")


@pytest.mark.parametrize("engine", ["fsdp"])
def test_batches_that_raise_on_one_process_stop_all(engine, processes, folder):
    said = processes.run(jobs.broken, folder, engine, [[[0], [1], [2]], [[3], [4]]])
    assert said == ["process 1 failed with OSError: the disk is gone"] * 2


@pytest.mark.parametrize("engine", ["plain"])
def test_bad_samples_left_out_are_numbered_through_the_processes(
    engine, processes, folder, alone, tmp_path
):
    numbers = processes.run(jobs.skipped, folder, engine, EVEN, (1, 3), str(tmp_path))
    assert numbers == [[1, 3]] * 2
    good = [sample for i, sample in enumerate(causal_samples()) if i not in (1, 3)]
    stats, _ = alone({"r": 2}, good)
    for found in both(Calibration, tmp_path, "stats"):
        assert_same_statistics(found, stats)


def test_one_cache_serves_all_processes(processes, folder, tmp_path):
    (key, again), other = processes.run(jobs.cached, folder, EVEN, str(tmp_path))
    assert other == (key, again)
    assert again
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_a_loss_that_is_not_finite_on_one_process_stops_all_at_one_step(processes):
    fine, nan = 1.0, float("nan")
    recovers = {0: [fine, nan, fine, fine], 1: [fine] * 4}
    assert processes.run(jobs.divergence, recovers) == [(0, 0, "")] * 2
    stays = {0: [fine] * 30, 1: [fine, nan, fine] + [nan] * 27}
    first, second = processes.run(jobs.divergence, stays)
    assert first == second
    assert first[:2] == (3 + RECOVERY_STEPS, 4)
    assert "step 4: the loss is not finite" in first[2]


def test_attaching_to_a_wrapped_model_is_refused_before_anything_runs(processes, folder, alone):
    _, found = alone({"r": 2})
    found.save(folder)
    first, second = processes.run(jobs.refused, folder)
    assert first == second
    assert len(first) == 4
    assert all("before" in sentence for sentence in first)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_plan_of_the_sharded_model_trains_on_the_plain_one_then_wrapped(
    engine, processes, folder, tmp_path
):
    processes.run(jobs.measure, folder, "fsdp", EVEN, {"r": 2}, str(tmp_path))
    first, second = processes.run(jobs.train, folder, engine, str(tmp_path / "plan-0.safetensors"))
    assert first == second


@pytest.mark.parametrize("dealt", [UNEVEN], ids=["none1"])
def test_weights_that_zero3_partitions_are_gathered_one_by_one(
    dealt, processes, folder, alone, tmp_path
):
    stats, expected = alone({"r": 2})
    gathered = processes.run(jobs.zero3, folder, dealt, str(tmp_path))
    # For planning each targeted weight once, on both processes in the same order.
    assert gathered[0] == gathered[1]
    assert len(gathered[0]) == len(set(gathered[0])) == len(expected.modules)
    for found in both(Calibration, tmp_path, "stats"):
        assert_same_statistics(found, stats)
    first, second = both(AdapterPlan, tmp_path, "plan")
    assert_equal_to_the_bit(first, second)
    assert_same_plan(first, expected)
