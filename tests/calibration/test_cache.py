"""A calibration in a file: used again, refused for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from tlora import Calibration, TLoraConfig, calibrate, get_tlora_model, plan
from tlora.errors import ArtifactError, CalibrationError

NAME = "calibration.safetensors"


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2, "lora_alpha": 2} | fields))


def batches() -> list[Any]:
    samples = [s for seed in range(2) for s in support.causal_samples(seed=seed)]
    return support.in_batches(samples, 2)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(initializer_range=0.2)


def saved(stats: Calibration, path: Path) -> bytes:
    return stats.save(path).read_bytes()


def passes(model: Any) -> list[int]:
    """A list that grows with every forward pass."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


# --- used again


@pytest.mark.parametrize("place", [".", "deep/er/stats.safetensors"])
def test_what_a_file_holds_is_not_measured_again(model, tmp_path, place):
    cache = tmp_path / place
    first = calibrate(model, batches(), config(), cache=cache)
    seen = passes(model)
    again = calibrate(model, iter(batches()), config(), cache=cache)

    assert seen == []
    assert saved(again, tmp_path / "b") == saved(first, tmp_path / "a")
    assert saved(calibrate(model, batches(), config()), tmp_path / "c") == saved(
        first, tmp_path / "a"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 5, "budget": "params", "seed": 3},
        {"whiten": True, "covariance": "exact"},
        {"basis": "random"},
        {"allocate_rank": False, "allocate_scale": False},
    ],
)
def test_any_plan_is_made_of_one_file(model, tmp_path, fields):
    calibrate(model, batches(), config(), cache=tmp_path)
    seen = passes(model)
    stats = calibrate(model, batches(), config(**fields), cache=tmp_path)
    assert plan(model, stats, config(**fields)).modules
    assert seen == []


def other_model(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


@pytest.mark.parametrize(
    ("names", "change"),
    [
        (["model"], {"model": True}),
        (["data"], {"data": batches()[::-1]}),
        (["data"], {"data": batches()[:-1]}),
        (["data"], {"data": support.in_batches(support.causal_samples(), 2)}),
        (["config"], {"config": {"target_modules": ["q_proj"]}}),
        (["model", "data", "config"], {"model": True, "data": [], "config": {"bias": "none"}}),
    ],
)
def test_a_file_of_another_calibration_is_refused(model, tmp_path, names, change):
    fields = {"exclude_modules": ["q_proj"]} if len(names) > 1 else {}
    path = tmp_path / NAME
    calibrate(model, batches(), config(**fields), cache=path)
    before = path.read_bytes()
    if change.get("model"):
        other_model(model)
    with pytest.raises(CalibrationError) as caught:
        calibrate(
            model,
            change.get("data", batches()),
            config(**change.get("config", {})),
            cache=path,
        )
    message = str(caught.value)
    assert [name for name in ("model", "data", "config") if f"its {name} (" in message] == names
    assert str(path) in message
    assert "delete this file to calibrate again" in message
    assert path.read_bytes() == before


def test_a_file_that_lacks_statistics_is_refused(model, tmp_path):
    calibrate(model, batches(), config(basis="random"), cache=tmp_path)
    with pytest.raises(CalibrationError, match=r"its config \(.*lacks required statistics"):
        calibrate(model, batches(), config(), cache=tmp_path)


def test_a_file_without_a_key_or_of_another_kind_is_refused(model, tmp_path):
    stats = calibrate(model, batches(), config())
    stats.key = None
    path = stats.save(tmp_path / NAME)
    with pytest.raises(CalibrationError, match=r"its model .* and its data"):
        calibrate(model, batches(), config(), cache=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a readable"):
        calibrate(model, batches(), config(), cache=path)


def test_a_folder_that_cannot_be_is_refused_before_anything_is_run(model, tmp_path):
    (tmp_path / "file").write_text("")
    seen = passes(model)
    with pytest.raises(CalibrationError, match="give `cache` another folder"):
        calibrate(model, batches(), config(), cache=tmp_path / "file" / NAME)
    assert seen == []


def test_bad_samples_that_were_left_out_stay_named(model, tmp_path):
    bad = batches()
    bad[1]["labels"][0] = -100
    with pytest.raises(CalibrationError, match="sample 2"):
        calibrate(model, bad, config(), cache=tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 10 .* 2 \(it has no label that counts\)"):
            stats = calibrate(model, bad, config(), cache=tmp_path, skip_bad_samples=True)
    assert stats.samples == 9
    with pytest.raises(CalibrationError, match=r"skips bad samples: allow .*skip_bad"):
        calibrate(model, bad, config(), cache=tmp_path)


def test_a_calibration_that_fails_leaves_no_file(model, tmp_path):
    def until(count: int) -> Iterator[Any]:
        yield from batches()[:count]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        calibrate(model, until(3), config(), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields", [{"memory_budget": 1}, {"covariance": "streamed"}])
def test_a_calibration_says_that_it_keeps_all_that_a_budget_bounds(model, tmp_path, fields):
    said = "keeps every second moment.*`get_tlora_model` without `cache`"
    with pytest.warns(UserWarning, match=said):
        stats = calibrate(model, batches(), config(**fields))
    for name, module in calibrate(model, batches(), config()).modules.items():
        assert torch.equal(stats.modules[name].covariance(), module.covariance())
    with pytest.warns(UserWarning, match=said):
        get_tlora_model(model, config(**fields), batches(), cache=tmp_path)
    assert list(tmp_path.iterdir())
