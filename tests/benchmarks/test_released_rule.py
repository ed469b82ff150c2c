"""The straightforward rule that the cost benchmark compares with gives what the library gives."""

from __future__ import annotations

import pytest
import torch

import support
from tlora import TLoraConfig, calibrate, plan


@pytest.fixture
def released_rule(script):
    return script("cost", "released_rule")


def test_it_gives_the_sensitivities_moments_ranks_scales_and_subspaces_of_the_library(
    released_rule, tiny_llama
):
    samples = support.causal_samples((9, 12, 7, 20), seed=3)
    config = TLoraConfig(r=2, lora_alpha=2, subspace="exact", rank_min=0)
    model = tiny_llama(initializer_range=0.2)
    stats = calibrate(model, support.in_batches(samples, 2), config)
    ours = plan(model, stats, config)
    assert max(m.rank for m in ours.modules.values()) > min(m.rank for m in ours.modules.values())

    measured = released_rule.measure(model, samples, list(ours))
    for name, module in stats.modules.items():
        assert measured.sensitivity[name].item() == pytest.approx(module.sensitivity, rel=1e-4)
        assert support.distance(measured.moment[name], module.covariance().double()) < 1e-5
    adapted = released_rule.initialise(model, samples, list(ours), r=2)
    for name, module in ours.modules.items():
        layer = adapted.base_model.model.get_submodule(name)
        if module.rank == 0:
            assert not hasattr(layer, "lora_A")
            continue
        basis = layer.lora_A["default"].weight
        assert basis.shape == module.lora_A.shape
        assert layer.scaling["default"] == pytest.approx(module.scale)
        cosines = (basis.double() @ module.lora_A.double().T).diagonal().abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)
