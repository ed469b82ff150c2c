"""The Gaussian over layers is the one of the dense matrices."""

import math

import pytest
import torch

from tlora.linalg.posterior import (
    KroneckerFactors,
    curvature_roots,
    evidence_precision,
    predictive,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(m, d, tokens=7):
    inputs, gradients = drawn(tokens, d, seed=1), drawn(2 * tokens, m, seed=2)
    factors = KroneckerFactors(m, d, like=inputs)
    for rows in inputs.split(3):
        factors.add_inputs(rows)
    factors.add_gradients(gradients)
    dense = torch.kron(gradients.T @ gradients, inputs.T @ inputs / tokens)
    return factors.curvature(), dense


def test_the_covariance_is_that_of_the_dense_precision():
    layer, dense = fitted(3, 4)
    jacobian = drawn(5, 3, 4, seed=3)
    whitened = layer.whitened(jacobian, 0.3).flatten(1)
    flat = jacobian.flatten(1)
    precision = dense + 0.3 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(whitened @ whitened.T, flat @ torch.linalg.solve(precision, flat.T))
    assert not layer.whitened(jacobian, math.inf).any()


def test_the_prior_precision_has_the_greatest_dense_evidence():
    layers = [fitted(3, 4), fitted(2, 5)]
    norm = 6.5
    found = evidence_precision([layer.eigenvalues for layer, _ in layers], norm)

    def evidence(delta):
        size = sum(len(dense) for _, dense in layers)
        determinants = sum(
            torch.logdet(dense + delta * torch.eye(len(dense), dtype=torch.float64))
            for _, dense in layers
        )
        return 0.5 * (size * math.log(delta) - delta * norm - determinants)

    assert all(evidence(found) > evidence(found * factor) for factor in (0.2, 0.98, 1.02, 5))


def test_weights_at_zero_leave_no_uncertainty():
    layer, _ = fitted(3, 4)
    assert evidence_precision([layer.eigenvalues], 0.0) == pytest.approx(1e10)


def test_the_roots_are_those_of_the_softmax_hessian():
    odds = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.0]], dtype=torch.float64)
    roots = curvature_roots(odds)
    wanted = torch.stack([p.diag() - torch.outer(p, p) for p in odds])
    torch.testing.assert_close(roots @ roots.mT, wanted, atol=1e-12, rtol=0)


def test_the_predictive_is_the_integral():
    logits, covariance = torch.tensor([1.0, -0.5]), torch.tensor([[2.0, 0.4], [0.4, 1.0]])
    normals = drawn(200_000, 2)
    found = predictive(logits, covariance, normals)
    mean, spread = 1.5, math.sqrt(2.0 + 1.0 - 2 * 0.4)  # of the logits' difference
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    wanted = torch.trapezoid(torch.sigmoid(mean + spread * grid) * density, grid).item()
    assert found.tolist() == pytest.approx([wanted, 1 - wanted], abs=2e-3)
    plain = predictive(logits, torch.zeros(2, 2), normals)
    torch.testing.assert_close(plain, logits.double().softmax(0))
