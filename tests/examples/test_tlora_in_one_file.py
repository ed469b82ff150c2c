"""The method in one file gives what the library gives."""

from __future__ import annotations

import pytest
import torch

import support
from tlora import TLoraConfig, calibrate, plan


def test_it_gives_the_sensitivities_moments_ranks_scales_and_subspaces_of_the_library(
    example, tiny_llama
):
    one_file = example("tlora_in_one_file")
    samples = support.causal_samples((9, 12, 7, 20), seed=3)
    config = TLoraConfig(r=2, lora_alpha=2, subspace="exact", rank_min=0)
    model = tiny_llama(initializer_range=0.2)
    stats = calibrate(model, support.in_batches(samples, 2), config)
    ours = plan(model, stats, config)
    assert max(m.rank for m in ours.modules.values()) > min(m.rank for m in ours.modules.values())

    sensitivities, moments = one_file.calibrate(model, samples, list(ours))
    for name, module in stats.modules.items():
        assert sensitivities[name].item() == pytest.approx(module.sensitivity, rel=1e-4)
        assert support.distance(moments[name], module.covariance().double()) < 1e-5
    adapted = one_file.initialize(model, samples, list(ours), r=2)
    for name, module in ours.modules.items():
        layer = adapted.base_model.model.get_submodule(name)
        if module.rank == 0:
            assert not hasattr(layer, "lora_A")
            continue
        basis = layer.lora_A["default"].weight
        assert not basis.requires_grad
        assert not layer.lora_B["default"].weight.any()
        assert basis.shape == module.lora_A.shape
        assert layer.scaling["default"] == pytest.approx(module.scale)
        cosines = (basis.double() @ module.lora_A.double().T).diagonal().abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)


def test_it_runs_on_the_base_that_comes_with_the_package(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tlora_in_one_file.py"])
    example("tlora_in_one_file").main()
    header, *rows, trainable = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("rank scale energy")
    assert sum(int(row.split()[0]) for row in rows) == 8 * len(rows)
    energies = [float(row.split()[2]) for row in rows if row.split()[2] != "-"]
    assert energies
    assert all(0 < energy <= 1 for energy in energies)
    assert trainable.startswith("trainable params")
