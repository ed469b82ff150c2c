"""What the benchmarks of robustness say of two calibrations is what it is defined to be."""

from __future__ import annotations

import pytest
import torch

from tlora import TLoraConfig, calibrate


@pytest.fixture
def agreement(script):
    return script("quality", "agreement")


def orthonormal(rows, dim, seed=0):
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn.T).Q.T


def measured(agreement, sensitivities, bases):
    names = [f"layers.{i}.fc" for i in range(len(sensitivities))]
    shapes = [(64, basis.shape[1]) for basis in bases]
    return agreement.Measured(
        dict(zip(names, sensitivities, strict=True)),
        dict(zip(names, shapes, strict=True)),
        dict(zip(names, bases, strict=True)),
    )


def test_a_subspace_overlaps_wholly_with_itself_in_any_basis_and_not_with_its_complement(agreement):
    whole = orthonormal(8, 8)
    mine, rest = whole[:3], whole[3:]
    turned = orthonormal(3, 3, seed=1) @ mine
    assert agreement.overlap(mine, mine) == pytest.approx(1)
    assert agreement.overlap(mine, turned) == pytest.approx(1)
    assert agreement.overlap(mine, rest) == pytest.approx(0, abs=1e-12)


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles(agreement):
    one, other = orthonormal(3, 8), orthonormal(3, 8, seed=1)
    cosines = torch.linalg.svdvals(one.double() @ other.double().T)
    assert agreement.overlap(one, other) == pytest.approx(float(cosines.square().mean()))


def test_random_subspaces_overlap_by_what_is_said_of_chance(agreement):
    found = measured(agreement, [1.0], [orthonormal(4, 32)])
    drawn = [
        agreement.overlap(found.basis["layers.0.fc"], orthonormal(4, 32, s)) for s in range(1, 300)
    ]
    assert sum(drawn) / len(drawn) == pytest.approx(agreement.by_chance(found), rel=0.1)


def test_a_calibration_agrees_with_itself(agreement):
    found = measured(agreement, [1.0, 5.0, 2.0], [orthonormal(4, 16, s) for s in range(3)])
    assert agreement.agreement(found, found) == pytest.approx(
        {"spearman": 1, "equal_ranks": 1, "moved_ranks": 0, "overlap": 1, "lowest_overlap": 1}
    )


def test_ranks_that_trade_places_are_counted_once(agreement):
    bases = [orthonormal(4, 16, s) for s in range(3)]
    one = measured(agreement, [1.0, 3.0, 2.0], bases)
    other = measured(agreement, [3.0, 1.0, 2.0], bases)
    assert agreement.ranks(one, 4) == [2, 6, 4]
    found = agreement.agreement(one, other)
    assert found["equal_ranks"] == pytest.approx(1 / 3)
    assert found["moved_ranks"] == pytest.approx(4 / 12)
    assert found["spearman"] == pytest.approx(-1)


def test_concentration_of_even_and_of_single_sensitivities(agreement):
    bases = [orthonormal(4, 16)] * 20
    even = agreement.concentration(measured(agreement, [2.0] * 20, bases))
    assert even == pytest.approx({"top_tenth": 0.1, "modules_of_half": 0.5})
    single = agreement.concentration(measured(agreement, [0.0] * 19 + [1.0], bases))
    assert single == pytest.approx({"top_tenth": 1, "modules_of_half": 0.05})


def test_no_pair_has_no_agreement(agreement):
    assert agreement.mean_agreement([]) is None


def test_pooled_calibrations_equal_one_of_all_samples(agreement, tiny_llama):
    model = tiny_llama()
    config = TLoraConfig(r=3, lora_alpha=3)
    draw = torch.Generator().manual_seed(0)
    batches = []
    for rows, tokens in ((2, 9), (3, 5)):
        ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=draw)
        batches.append({"input_ids": ids, "labels": ids})
    whole = calibrate(model, batches, config, progress=False)
    parts = [calibrate(model, [batch], config, progress=False) for batch in batches]
    found = agreement.pooled(*parts)
    assert found.samples == whole.samples == 5
    for name, module in whole.modules.items():
        mine = found.modules[name]
        assert mine.sensitivity == pytest.approx(module.sensitivity, rel=1e-5)
        torch.testing.assert_close(mine.covariance(), module.covariance(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.uncentered(), module.uncentered(), rtol=1e-4, atol=1e-6)
