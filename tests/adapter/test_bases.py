"""Each basis against its definition by dense algebra in float64, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import support
from tlora import TLoraConfig, calibrate, plan
from tlora.adapter.solve import MATRICES
from tlora.calibration.statistics import ModuleStatistics
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight
from tlora.config import Basis
from tlora.errors import CalibrationError

OTHERS = get_args(Basis)[2:]
FLAT: dict[str, Any] = {"allocate_rank": False, "allocate_scale": False}


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 3, "lora_alpha": 3} | FLAT | fields))


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def covariance(s: ModuleStatistics) -> Tensor:
    return s.covariance().double()


def gradient_moment(s: ModuleStatistics) -> Tensor:
    return s.require("gradient_moment").covariance().double()


DEFINITIONS: dict[str, Callable[[Tensor, ModuleStatistics], Tensor]] = {
    "weight-covariance": lambda w, s: w @ covariance(s),
    "covariance": lambda _, s: covariance(s),
    "weight-half-covariance": lambda w, s: w @ root(covariance(s)),
    "gradient": lambda _, s: s.require("gradient").double(),
    "gradient-covariance": lambda _, s: s.require("gradient").double() @ covariance(s),
    "gradient-moment": lambda _, s: gradient_moment(s),
    "weight-gradient-moment": lambda w, s: w @ gradient_moment(s),
}


def many(count: int) -> list[Any]:
    """Samples of few tokens (moments stay rows) or of many (they are formed)."""
    return [s for seed in range(count) for s in support.causal_samples((9, 4, 12), seed=seed)]


@pytest.fixture(params=[1, 8], ids=["rows", "formed"])
def batches(request):
    return support.in_batches(many(request.param)[: 1 if request.param == 1 else None], 3)


@pytest.mark.parametrize("basis", MATRICES)
def test_a_is_the_leading_singular_vectors_of_the_matrix_of_its_basis(tiny_gpt2, batches, basis):
    model = tiny_gpt2(initializer_range=0.2)
    made = config(basis=basis, subspace="exact")
    stats = calibrate(model, batches, made)
    found = plan(model, stats, made)
    for target in find_targets(model, made):
        module, weight = found.modules[target.name], dense_weight(target).double()
        matrix = DEFINITIONS[basis](weight, stats.modules[target.name])
        _, values, vectors = torch.linalg.svd(matrix)
        kept = (matrix @ module.lora_A.double().T).square().sum() / matrix.square().sum()
        best = values[:3].square().sum() / values.square().sum()
        assert kept.item() == pytest.approx(best.item(), rel=1e-4), target.name
        assert module.captured_energy == pytest.approx(best.item(), rel=1e-3), target.name
        total = matrix.square().sum().item()
        assert module.total_energy == pytest.approx(total, rel=1e-3), target.name
        assert support.distance(module.lora_A @ module.lora_A.T, torch.eye(3)) < 1e-5
        if values[2] > 1.2 * values[3]:
            overlap = (vectors[:3] @ module.lora_A.double().T).square().sum() / 3
            assert overlap.item() == pytest.approx(1.0, abs=1e-3), target.name


@pytest.mark.parametrize("basis", OTHERS)
def test_the_randomized_solver_keeps_what_the_exact_one_keeps(tiny_llama, basis):
    fields = {"intermediate_size": 300, "hidden_size": 264, "num_hidden_layers": 1}
    model = tiny_llama(**fields)
    names = ["down_proj", "q_proj", "gate_proj"]
    plans = []
    for mode in ("exact", "randomized"):
        made = config(basis=basis, subspace=mode, target_modules=names)
        stats = calibrate(model, support.in_batches(many(3), 3), made)
        plans.append(plan(model, stats, made).modules)
    exact, randomized = plans
    for name, module in randomized.items():
        assert module.solver == "randomized"
        assert exact[name].solver == "exact"
        assert module.captured_energy == pytest.approx(exact[name].captured_energy, rel=1e-3)


@pytest.mark.parametrize("basis", ["random", "weight-covariance", "gradient-covariance"])
def test_half_whitening_takes_the_square_root_of_the_variances(tiny_llama, basis):
    model, samples = tiny_llama(initializer_range=0.2), support.in_batches(many(4), 3)
    plans = {}
    for whiten in (False, "half", True):
        made = config(basis=basis, whiten=whiten)
        stats = calibrate(model, samples, made if whiten else config(basis=basis, whiten=True))
        plans[whiten] = plan(model, stats, made).modules
    for name, module in plans["half"].items():
        uncentered = stats.modules[name].uncentered().double()
        plain, half, full = (
            each[name].lora_A.double() @ uncentered @ each[name].lora_A.double().T
            for each in plans.values()
        )
        before, after, whitened = map(torch.linalg.eigvalsh, (plain, half, full))
        # K' = c^2 K^(1/2), and with full whitening c^2 times the identity.
        if before[0] > 1e-5 * before[-1]:
            expected = (before / before[-1]).sqrt()
            assert support.distance(after / after[-1], expected) < 1e-4, name
            assert support.distance(whitened / whitened[-1], torch.ones(3)) < 1e-3, name
        assert module.lora_A.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=1e-5)


def test_fisher_shares_ranks_out_by_squared_gradients(tiny_llama):
    model, samples = tiny_llama(initializer_range=0.2), support.in_batches(many(2), 3)
    made = TLoraConfig(r=4, lora_alpha=4, sensitivity_rule="fisher")
    stats = calibrate(model, samples, made)
    found = plan(model, stats, made)
    total = sum(module.fisher for module in stats.modules.values())
    for name, module in found.modules.items():
        share = len(found) * stats.modules[name].fisher / total
        assert module.sensitivity == stats.modules[name].fisher
        assert module.scale == max(4, round(4 * share)) / 4
    ranks = {name: module.rank for name, module in found.modules.items()}
    assert sum(ranks.values()) == 4 * len(ranks)
    paper = plan(model, calibrate(model, samples, TLoraConfig(r=4)), TLoraConfig(r=4))
    assert ranks != {name: module.rank for name, module in paper.modules.items()}


@pytest.mark.parametrize(
    ("measured", "planned", "lacks"),
    [
        ({"basis": "weight-covariance"}, {"basis": "gradient"}, "no mean gradient was kept"),
        ({"basis": "gradient"}, {"basis": "gradient-moment"}, "gradient-weighted second moment"),
        ({"basis": "gradient"}, {"basis": "covariance"}, "no second moment was kept"),
        ({}, {"allocate_rank": True, "sensitivity_rule": "fisher"}, "no squared gradient"),
    ],
)
def test_a_plan_says_what_its_calibration_lacks(tiny_llama, measured, planned, lacks):
    model = tiny_llama()
    stats = calibrate(model, support.in_batches(many(1), 3), config(**measured))
    with pytest.raises(CalibrationError, match=lacks):
        plan(model, stats, config(**planned))


@pytest.mark.parametrize("basis", get_args(Basis))
def test_every_basis_says_what_it_needs(basis):
    made = config(basis=basis)
    assert made.needs_moments is basis.endswith("covariance")
    assert made.needs_gradient is (basis in ("gradient", "gradient-covariance"))
    assert made.needs_gradient_moment is basis.endswith("gradient-moment")
    assert made.needs_backward is ("gradient" in basis)
    assert (basis in MATRICES) is (basis != "random")
