"""The Triton kernel: its numbers by Triton's interpreter, its code by compiling it for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Triton is made for Linux, where the kernel runs"
)


def run(script: str, tmp_path: Path, **variables: str) -> Any:
    """Run a script of this folder apart: Triton reads its variables when it is imported."""
    # Nothing that was compiled before counts.
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)} | variables
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_kernel_gives_the_definition(tmp_path):
    cases = run("interpreted_kernel.py", tmp_path, TRITON_INTERPRET="1")
    assert len(cases) > 10
    for case in cases:
        assert case["error"] < 1e-6, case
        assert case["from torch path"] < 1e-6, case
        assert case["same again"], case


def test_the_kernel_compiles_for_the_gpus_it_is_used_on(tmp_path):
    made = run("compiled_kernel.py", tmp_path)
    assert {case["capability"] for case in made} == {80, 86, 90, 100}
    for case in made:
        # What one thread block may have: 99 KiB on consumer GPUs, 227 KiB on Hopper.
        assert case["shared"] <= (227 if case["capability"] in (90, 100) else 99) * 1024, case
        assert case["tensor cores"], case
        assert case["stack"] == 0, case  # no sum is spilled to memory
