"""The analyses of trained updates say of made-up updates what is true of them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def analyses(script):
    return script("quality", "analyses")


@pytest.fixture
def base():
    made = torch.Generator().manual_seed(0)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    return {name: torch.randn(12, 16, dtype=torch.float64, generator=made) for name in names}


def test_a_move_along_the_leading_directions_is_principal(analyses, base):
    first, last = {}, {}
    for name, weight in base.items():
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        first[name] = 0.5 * (u[:, :4] * s[:4]) @ v[:4]
        last[name] = u[:, -4:] @ v[-4:]
    found = analyses.movement({"full, ledger": first, "full, program": last, "lora": last}, base)
    assert set(found["tasks"]) == {"ledger", "program"}
    for name, weight in base.items():
        ledger, program = found["tasks"]["ledger"], found["tasks"]["program"]
        assert (ledger["principal"][name], ledger["minor"][name]) == pytest.approx((1, 0))
        assert (program["principal"][name], program["minor"][name]) == pytest.approx((0, 1))
        assert program["moved"][name] == pytest.approx(2 / float(weight.norm()), rel=1e-3)
        assert found["between_tasks"][name] == pytest.approx(0)
        assert found["share_by_chance"][name] == 4 / 16


def test_adapted_weights_agree_where_updates_do_not(analyses, base):
    small = {name: 0.01 * weight.roll(1, 0) for name, weight in base.items()}
    other = {name: -update for name, update in small.items()}
    found = analyses.cosines({"lora": small, "trimatrix": other}, base)
    assert all(v == pytest.approx(-1) for v in found["of_updates"]["trimatrix"].values())
    assert all(v > 0.99 for v in found["of_weights"]["trimatrix"].values())


def test_a_histogram_of_gaussians_of_any_size_is_gaussian(analyses):
    made = torch.Generator().manual_seed(0)
    found = analyses.shape([size * torch.randn(200, 200, generator=made) for size in (0.1, 1, 30)])
    width = 2 * analyses.WIDEST / analyses.BINS
    assert sum(found["density"]) * width == pytest.approx(1, rel=1e-3)
    assert max(found["density"]) == pytest.approx((2 * torch.pi) ** -0.5, abs=0.02)
    assert found["excess"] == pytest.approx(0, abs=0.1)
