"""Laplace approximation over linear layers: Kronecker factors, evidence, predictive distribution.

The weights are Gaussian around the trained values, independent across layers. For a layer y = W x
the precision is H + delta I, where H = A (x) G approximates the generalized Gauss-Newton matrix of
the negative log-likelihood (KFAC: Martens and Grosse 2015) and delta is the precision of the prior
N(0, I / delta).

Source: Yang et al., arXiv 2308.13111, sections 3 and 4, and the authors' code. Departure: A and G
are dense; the paper keeps only leading directions of the wide factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.linalg.matrices import full_precision

_LOW, _HIGH = 1e-10, 1e10
_HALVINGS = 60


@dataclass(frozen=True)
class LayerCurvature:
    """H of one layer, in its eigenbasis.

    Attributes:
        inputs: eigenvectors of A, d x d.
        gradients: eigenvectors of G, m x m.
        eigenvalues: of H, m x d: each eigenvalue of G times each of A.
    """

    inputs: Tensor
    gradients: Tensor
    eigenvalues: Tensor

    @full_precision
    def whitened(self, jacobian: Tensor, precision: float) -> Tensor:
        """Return (H + delta I)^(-1/2) J; products of two such matrices are their posterior
        covariance.

        Args:
            jacobian: J, ... x m x d: derivatives with respect to W.
            precision: delta; if infinite, the weights do not vary.
        """
        turned: Tensor = self.gradients.T @ jacobian.to(self.inputs) @ self.inputs
        return turned * (self.eigenvalues + precision).rsqrt()


class KroneckerFactors:
    """A = (1/T) sum_t x_t x_t^T and G = sum_t g_t g_t^T of one layer, over all T tokens.

    This is KFAC-expand (Eschenhagen et al., arXiv 2311.00636): each token counts as a sample.

    Args:
        m: outputs of the layer.
        d: inputs of the layer.
        like: gives the accumulators' dtype and device.
    """

    def __init__(self, m: int, d: int, like: Tensor) -> None:
        self.tokens = 0
        self._inputs, self._gradients = like.new_zeros(d, d), like.new_zeros(m, m)

    @full_precision
    def add_inputs(self, rows: Tensor) -> None:
        """Add the token inputs x, tokens x d."""
        rows = rows.to(self._inputs)
        self._inputs.addmm_(rows.T, rows)
        self.tokens += len(rows)

    @full_precision
    def add_gradients(self, rows: Tensor) -> None:
        """Add gradients g by the layer's outputs, rows x m; a token may have several."""
        rows = rows.to(self._gradients)
        self._gradients.addmm_(rows.T, rows)

    def curvature(self) -> LayerCurvature:
        """Return A (x) G in its eigenbasis."""
        of_inputs, inputs = torch.linalg.eigh(self._inputs / max(self.tokens, 1))
        of_gradients, gradients = torch.linalg.eigh(self._gradients)
        eigenvalues = torch.outer(of_gradients.clamp_min(0), of_inputs.clamp_min(0))
        return LayerCurvature(inputs, gradients, eigenvalues)


def curvature_roots(probabilities: Tensor) -> Tensor:
    """Return R with R R^T = diag(p) - p p^T: the Hessian of -log softmax by the logits.

    Args:
        probabilities: p, S x K; a row may be a part of a longer distribution.

    Returns:
        S x K x K.
    """
    outer = probabilities[:, :, None] * probabilities[:, None]
    values, vectors = torch.linalg.eigh(torch.diag_embed(probabilities) - outer)
    roots: Tensor = vectors * values.clamp_min(0).sqrt()[:, None]
    return roots


def evidence_precision(eigenvalues: Sequence[Tensor], squared_norm: float) -> float:
    """Return the delta that maximizes the marginal likelihood, between 1e-10 and 1e10.

    Its logarithm is, up to a constant, (P log delta - delta ||w||^2 - sum log(lambda + delta)) / 2,
    which has its maximum where sum lambda / (lambda + delta) = delta ||w||^2: the left side
    decreases with delta and the right side increases, so the solution is unique.

    Args:
        eigenvalues: lambda, of H of each layer.
        squared_norm: ||w||^2, of the trained weights.

    Source: MacKay 1992. Departure: the root is found by bisection; the paper runs 100 steps of
    Adam.
    """
    low, high = math.log(_LOW), math.log(_HIGH)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        delta = math.exp(middle)
        determined = sum((part / (part + delta)).double().sum().item() for part in eigenvalues)
        low, high = (middle, high) if determined > delta * squared_norm else (low, middle)
    return math.exp((low + high) / 2)


def predictive(logits: Tensor, covariance: Tensor, normals: Tensor) -> Tensor:
    """Return the mean of softmax(f) over f ~ N(logits, covariance), by sampling; C probabilities.

    Args:
        logits: C.
        covariance: C x C.
        normals: standard normal samples, samples x C.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = vectors * values.clamp_min(0).sqrt()
    drawn: Tensor = logits.double() + normals.double() @ root.T
    return drawn.softmax(dim=-1).mean(dim=0)
