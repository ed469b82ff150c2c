"""`tlora train` by DeepSpeed's configs, where DeepSpeed is installed (docs/distributed.md)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import runs
from test_launched import accelerate, launched

from tlora.training.runfolder import RunFolder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SCRIPT = Path(__file__).parents[2] / "scripts" / "check_deepspeed.py"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_in_two_processes_as_one_process_does_and_resumes(
    stage: int, rows: str, alone: RunFolder, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    command = [*accelerate(f"zero{stage}"), "-m", "tlora.cli", "train"]
    flags = runs.flags(runs.config(runs.BASE, rows, str(folder.path), batch_size=2))
    launched([*command, *flags])
    runs.assert_same(folder, alone)
    runs.stop_at(folder, 2, processes=2)
    [said] = launched([*command, *flags])
    assert "from step 2" in said
    runs.assert_same(folder, alone)


def test_statistics_and_plans_of_an_engine_are_those_of_one_process() -> None:
    [said] = launched(
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    )
    lines = [line for line in said.splitlines() if line.startswith("ZeRO-")]
    assert len(lines) == 4
    for line in lines:
        sensitivity, moment = map(float, re.findall(r"within (\S+?)[,; ]", line + " "))
        assert max(sensitivity, moment) < 1e-5
        assert float(re.search(r"overlap (\S+),", line)[1]) > 1 - 1e-4
        assert line.endswith("one plan: True")
