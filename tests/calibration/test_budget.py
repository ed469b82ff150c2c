"""The memory budget: as given, or a share of the device's total memory that nothing else moves."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import support
from support import Toy, toy_batch, toy_samples
from tlora import TLoraConfig, calibrate
from tlora.calibration import budget
from tlora.calibration.accumulators import moment_bytes
from tlora.calibration.budget import MemoryBudget, on_devices, resolved
from tlora.calibration.group import ProcessGroup
from tlora.calibration.weights import Target

GIB = 2**30
GPU = torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)


def targets(*columns: int) -> list[Target]:
    return [Target(f"{d}", nn.Linear(1, 1), d, 8) for d in columns]


@pytest.fixture
def gib_of(monkeypatch):
    """Set the memory of each device, in GiB."""

    def set_to(**gib: float) -> None:
        monkeypatch.setattr(
            budget, "total_memory", lambda device: int(gib[f"{device.type}{device.index}"] * GIB)
        )

    return set_to


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (24, 14, GIB // 2),
        (80, 14, 66 * GIB // 20),
        (140, 14, 4 * GIB),  # 6.3, and 4 is the most
        (8, 8, moment_bytes(4096)),
        (8, 10, moment_bytes(4096)),
    ],
)
def test_auto_is_a_twentieth_of_what_the_weights_leave_within_bounds(
    total, weights, expected, gib_of
):
    gib_of(cuda0=total)
    found = on_devices([(GPU, weights * GIB)], targets(64, 4096))
    assert found.bytes == expected
    left = f"{total - weights}.0 GiB" if total > weights else "0 B"
    assert f"1/20 of the {left} that the weights leave on cuda:0" in found.explained()


def test_an_automatic_budget_leaves_most_of_the_first_pass_to_activations():
    assert MemoryBudget(4000, "1/20").first == 1000
    assert MemoryBudget(4000).first == 4000  # as the user gave it
    assert MemoryBudget(None).first is None


def test_the_cpu_sets_no_limit_and_the_fullest_accelerator_counts(gib_of):
    gib_of(cuda0=80, cuda1=24)
    cpu = (torch.device("cpu"), GIB)
    assert on_devices([cpu], targets(64)) == MemoryBudget(None)
    several = on_devices([cpu, (GPU, GIB), (OTHER, 4 * GIB)], targets(64))
    assert several.bytes == GIB
    assert str(several) == "1.0 GiB, auto"


def test_the_weights_on_the_device_count_as_they_are_stored(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(torch.zeros(4, 8, device="meta"))
    assert budget._weight_bytes(model, torch.device("cpu")) == 4 * 4 + 2 * (8 + 2)
    monkeypatch.setattr(budget, "device_of", lambda _: GPU)
    monkeypatch.setattr(budget, "total_memory", lambda _: 10 * GIB)
    # None of them lies on this device.
    found = resolved(TLoraConfig(), model, targets(8), ProcessGroup())
    assert found.bytes == GIB // 2


@pytest.mark.parametrize(
    ("device", "backend"), [("cuda:3", "cuda"), ("xpu:0", "xpu"), ("mps", "mps")]
)
def test_the_total_memory_is_asked_of_the_devices_library(device, backend, monkeypatch):
    library = types.SimpleNamespace(
        get_device_properties=lambda asked: types.SimpleNamespace(
            total_memory=5 if asked == torch.device(device) else 0
        ),
        recommended_max_memory=lambda: 5,
    )
    monkeypatch.setattr(torch, backend, library)
    assert budget.total_memory(torch.device(device)) == 5


def test_processes_agree_on_the_smallest(monkeypatch):
    group = ProcessGroup()
    others = [MemoryBudget(None), MemoryBudget(2 * GIB, "there")]
    monkeypatch.setattr(group, "all_gather", lambda own: [own, *others])
    monkeypatch.setattr(budget, "device_of", lambda _: GPU)
    monkeypatch.setattr(budget, "total_memory", lambda _: 80 * GIB)
    model = nn.Linear(2, 2)
    assert resolved(TLoraConfig(), model, targets(8), group) == others[1]
    given = TLoraConfig(memory_budget="1GiB")
    assert resolved(given, model, targets(8), group) == MemoryBudget(GIB)
    assert resolved(TLoraConfig(memory_budget=None), model, targets(8), group).bytes is None


def test_a_calibration_alone_warns_of_a_budget_that_the_user_gives_only(recwarn):
    model, batch = support.seeded(Toy), toy_batch(toy_samples())
    config = TLoraConfig(r=2, target_modules=["first"])
    calibrate(model, [batch], config)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="keeps every second moment"):
        calibrate(model, [batch], TLoraConfig(r=2, target_modules=["first"], memory_budget="1GiB"))
