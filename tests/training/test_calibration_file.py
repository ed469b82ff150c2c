"""Runs that keep their calibration in a file, and runs that leave bad rows out."""

from __future__ import annotations

import json

import pytest
import torch

from tlora import AdapterPlan, Calibration
from tlora.calibration.collector import Collector
from tlora.errors import CalibrationError
from tlora.tasks.dataconfig import DataConfig
from tlora.training import initialize, train
from tlora.training.runconfig import CalibrationConfig


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Grows with every batch that is calibrated on."""
    seen: list[int] = []
    add = Collector.add
    monkeypatch.setattr(Collector, "add", lambda *given: (seen.append(1), add(*given)))
    return seen


def test_one_file_serves_init_train_and_another_rank(config, tmp_path, passes):
    cache = tmp_path / "kept" / "calibration.safetensors"
    options = CalibrationConfig(samples=4, batch_size=2, cache=str(cache))

    plain = initialize.run(config("plain"))
    del passes[:]
    first = initialize.run(config("first", calibration=options))
    assert len(passes) == 2
    assert Calibration.load(cache).samples == 4
    second = train.run(config("second", calibration=options))
    third = initialize.run(
        config("third", calibration=options, adapter={"r": 2, "allocate_rank": False})
    )
    assert len(passes) == 2

    # With the file as without it, up to rounding.
    left, right = AdapterPlan.load(plain.plan), AdapterPlan.load(first.plan)
    assert {n: (m.rank, m.scale) for n, m in left.modules.items()} == {
        n: (m.rank, m.scale) for n, m in right.modules.items()
    }
    for name, module in left.modules.items():
        torch.testing.assert_close(module.lora_A, right.modules[name].lora_A, atol=1e-3, rtol=0)
    assert first.plan.read_bytes() == second.plan.read_bytes()
    assert {m.rank for m in AdapterPlan.load(third.plan).modules.values()} == {2}


def test_other_rows_are_refused_before_the_folder_is_touched(config, tmp_path):
    cache = str(tmp_path / "calibration.safetensors")
    initialize.run(config("first", calibration=CalibrationConfig(samples=4, cache=cache)))
    with pytest.raises(CalibrationError, match=r"its data \("):
        train.run(config("second", calibration=CalibrationConfig(samples=5, cache=cache)))
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("kept", [False, True])
def test_rows_with_nothing_to_learn_are_left_out_on_demand(config, tmp_path, kept):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "so 4"}, {"text": ""}, {"text": "so 7 and 8"}, {"text": "ok 3"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"train_file": str(file), "data": DataConfig(text_column="text", loss_on="all")}
    with pytest.raises(CalibrationError, match="has no label that counts"):
        initialize.run(config("refused", **fields))

    cache = str(tmp_path / "calibration.safetensors") if kept else None
    options = CalibrationConfig(samples=4, batch_size=2, cache=cache, skip_bad_samples=True)
    with pytest.warns(UserWarning, match="1 of 4 calibration samples are bad and were skipped"):
        run = initialize.run(config("kept", calibration=options, **fields))
    info = AdapterPlan.load(run.plan).info
    assert (info["samples"], info["skipped"]) == (3, 1)
