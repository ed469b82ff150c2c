"""The comparison of a device with the CPU passes on the CPU itself, and finds differences."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def check_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield __import__("check_gpu")
    del sys.modules["check_gpu"]


def test_the_cpu_agrees_with_itself(check_gpu, capsys):
    check_gpu.main(["--device", "cpu"])
    assert "torch.bfloat16: the same seed gives the same plan" in capsys.readouterr().out


def test_a_device_that_plans_otherwise_is_named(check_gpu, monkeypatch):
    plan, seen = check_gpu.plan, []

    def other(model, stats, config):
        seen.append(model)
        wrong = dataclasses.replace(config, basis="covariance") if len(seen) % 2 == 0 else config
        return plan(model, stats, wrong)

    monkeypatch.setattr(check_gpu, "plan", other)
    with pytest.raises(SystemExit, match=r"torch.float32: apart .*, above 0.001"):
        check_gpu.main(["--device", "cpu"])
