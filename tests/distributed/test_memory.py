"""A process holds its part of a sharded model: what the dry run says, over their number."""

from __future__ import annotations

import memory_job
import pytest
from processes import SIZE

from tlora.tasks.dataconfig import DataConfig
from tlora.training import dryrun
from tlora.training.runconfig import RunConfig


def test_each_process_holds_its_part_within_a_tenth(processes, saved, tiny_llama):
    folder = saved(tiny_llama(hidden_size=64, intermediate_size=128))
    adapter = {"r": 8, "lora_alpha": 8, "allocate_rank": False}
    config = RunConfig(model=folder, data=DataConfig(max_length=16), adapter=adapter)
    whole = dryrun.run(config).training[0]
    for held in processes.run(memory_job.held, folder, 8):
        for name, found in held.items():
            assert found == pytest.approx(getattr(whole, name) / SIZE, rel=0.1), name
