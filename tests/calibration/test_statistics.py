"""What a calibration keeps, through a file and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import support
from tlora import Calibration, TLoraConfig, calibrate, plan
from tlora.errors import ArtifactError, CalibrationError
from tlora.files import seal_tensors


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(initializer_range=0.2)


@pytest.fixture
def stats(model) -> Calibration:
    return calibrate(model, support.in_batches(support.causal_samples(), 2), TLoraConfig(r=2))


def equal(a: Calibration, b: Calibration) -> bool:
    return (
        list(a.modules) == list(b.modules)
        and (a.samples, a.info) == (b.samples, b.info)
        and all(
            x.sensitivity == y.sensitivity
            and (x.name, x.d_in, x.d_out, x.samples, x.tokens, x.moment_id)
            == (y.name, y.d_in, y.d_out, y.samples, y.tokens, y.moment_id)
            and torch.equal(x.covariance(), y.covariance())
            and torch.equal(x.uncentered(), y.uncentered())
            for x, y in zip(a.modules.values(), b.modules.values(), strict=True)
        )
    )


def test_what_is_loaded_is_what_was_saved(stats, model, tmp_path):
    path = stats.save(tmp_path)
    assert path == tmp_path / "calibration.safetensors"
    loaded = Calibration.load(tmp_path)

    assert equal(loaded, stats)
    again = loaded.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    shared = [loaded.modules[f"model.layers.0.self_attn.{p}_proj"].moment for p in "qkv"]
    assert shared[0] is shared[1] is shared[2]
    for config in (TLoraConfig(r=2), TLoraConfig(r=3, whiten=True, budget="params")):
        one, two = plan(model, stats, config), plan(model, loaded, config)
        for name, module in one.modules.items():
            assert torch.equal(module.lora_A, two.modules[name].lora_A)
            assert module.scale == two.modules[name].scale


def test_shared_moments_are_stored_once(stats, tmp_path):
    with safe_open(stats.save(tmp_path), framework="pt") as file:
        kept = sorted(file.keys())
        header = json.loads(file.metadata()["tlora"])
    # Of 14 modules, q/k/v and gate/up of each of two layers read one tensor.
    assert len(kept) == 2 * 8
    assert len(header["modules"]) == len(stats) == 14


@pytest.mark.parametrize(
    "fields", [{"basis": "random"}, {"allocate_rank": False, "allocate_scale": False}]
)
def test_statistics_not_gathered_stay_missing(model, tmp_path, fields):
    config = TLoraConfig(r=2, **fields)
    stats = calibrate(model, support.causal_samples(), config)
    loaded = Calibration.load(stats.save(tmp_path))

    module = loaded.modules["model.layers.0.mlp.up_proj"]
    if "basis" in fields:
        with pytest.raises(CalibrationError, match=r"up_proj: no second moment.*basis="):
            module.covariance()
        with pytest.raises(CalibrationError, match=r"up_proj: no second moment.*basis="):
            module.uncentered()
        assert all(m.require("sensitivity") >= 0 for m in loaded.modules.values())
    else:
        with pytest.raises(CalibrationError, match=r"no sensitivity was measured.*allocate_rank"):
            module.require("sensitivity")
        assert module.covariance().shape == (16, 16)


def test_other_and_damaged_files_are_named(stats, model, tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        Calibration.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ArtifactError, match="'plan', not 'calibration'"):
        Calibration.load(plan(model, stats, TLoraConfig(r=2)).save(tmp_path))
    path = stats.save(tmp_path / "whole.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=r"whole\.safetensors"):
        Calibration.load(path)
    # In the header, whose length stays: a format of the same number of digits.
    assert whole.count(rb"\"format\": 6") == 1
    path.write_bytes(whole.replace(rb"\"format\": 6", rb"\"format\": 9"))
    with pytest.raises(ArtifactError, match="its content does not match its digest"):
        Calibration.load(path)
    seal_tensors(path)
    with pytest.raises(ArtifactError, match="it has format 9 and this version of tlora reads 6"):
        Calibration.load(path)
