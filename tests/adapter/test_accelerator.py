"""What only an accelerator reaches, on a device that pretends to be one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_plan_on_an_accelerator_is_that_of_the_cpu():
    paths = [HERE.parents[1] / "src", HERE.parent]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "pretended_accelerator.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    # An operation on tensors of two devices raises there.
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 3
    for case in cases:
        found, expected = case["ranks"]
        assert found == expected, case
        assert case["energy"] < 1e-4, case
        # The device rounds the 16-bit activations of the model itself in another order.
        assert case["sensitivity"] < 1e-2, case
    one_layer, three = cases[0]["reads"]
    # One read a module, of its sensitivity.
    assert three - one_layer <= 2 * cases[0]["modules"], cases[0]
