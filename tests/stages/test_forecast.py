"""What a run says of its calibration beforehand is what its calibration then does."""

from __future__ import annotations

import pytest
import torch

from support import FAMILIES, make_family
from tlora import TLoraConfig
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.accumulators import MomentAccumulator
from tlora.runconfig import CalibrationConfig
from tlora.stages import initialise
from tlora.stages.forecast import forecast, sentence


@pytest.mark.parametrize("budget", [None, 1, 5000])
@pytest.mark.parametrize("name", FAMILIES)
def test_passes_and_what_is_held_are_as_forecast(name, budget, request, monkeypatch):
    family = make_family(name, request.getfixturevalue)
    config = TLoraConfig(**family.config, memory_budget=budget, covariance="exact")
    batches = family.batches(2)
    samples = CalibrationConfig(samples=4, batch_size=2)
    before = {key: value.clone() for key, value in family.model.state_dict().items()}
    found = forecast(family.model, config, batches, samples).strategy
    assert all(torch.equal(before[k], v) for k, v in family.model.state_dict().items())
    held: list[int] = []
    update = MomentAccumulator.update
    monkeypatch.setattr(
        MomentAccumulator, "update", lambda into, *a: (update(into, *a), held.append(into.bytes))
    )
    made = plan_in_blocks(family.model, batches, config, progress=False)
    if name == "bart-classifier":  # asks for numbers, so its shared inputs are not seen
        assert max(held) <= found.held
    else:
        assert made.info["passes"] == found.passes
        assert max(held) == found.held


def test_a_run_says_it_first(config, caplog, monkeypatch):
    monkeypatch.setattr(initialise, "save_adapter", lambda *_: None)
    with caplog.at_level("INFO", "tlora.stages"):
        run = initialise.run(config(adapter={"r": 2, "memory_budget": 1, "covariance": "exact"}))
    line = next(r.getMessage() for r in caplog.records if "calibration" in r.getMessage())
    assert f"{run.saved_plan().info['passes']} passes over the samples" in line
    assert "peak about" in line


def test_another_method_forecasts_nothing(config, caplog):
    with caplog.at_level("INFO", "tlora.stages"):
        initialise.run(config(method="lora", adapter={"r": 2}))
    assert "calibration" not in caplog.text


def test_the_sentence_names_choice_passes_and_peak(request):
    family = make_family("llama-right", request.getfixturevalue)
    samples = CalibrationConfig(samples=4, batch_size=2)
    config = TLoraConfig(**family.config, memory_budget=2000)
    line = sentence(forecast(family.model, config, family.batches(2), samples))
    for part in ("12 modules exact", "2 modules streamed", "passes", "KiB held", "peak about"):
        assert part in line
