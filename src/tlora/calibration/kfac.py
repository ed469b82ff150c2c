"""Kronecker factors and Jacobians of linear layers in a model that scores classes or choices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlora.calibration.batches import TokenLayout, UnknownLayout, token_layout
from tlora.calibration.preserve import preserved
from tlora.errors import CalibrationError
from tlora.linalg.posterior import KroneckerFactors, LayerCurvature, curvature_roots

Layers = Mapping[str, nn.Linear]


@dataclass(frozen=True)
class ScoredBatch:
    """S sequences of several items, and the position of the items' logits in the model's output.

    Attributes:
        inputs: the model's forward arguments.
        scores: the model's output -> S x K float32.
        items: number of sequences of each item, in order. An item's logits are the scores of all
            its sequences: K classes of one sequence, or one score per choice.
    """

    inputs: Mapping[str, Tensor]
    scores: Callable[[Any], Tensor]
    items: list[int]


def curvatures(
    model: nn.Module, layers: Layers, batches: Iterable[ScoredBatch]
) -> dict[str, LayerCurvature]:
    """Return the curvature of the items' negative log-likelihood by each layer's weight.

    This is the curvature of a softmax over an item's logits, so it needs no labels. Padding does
    not count. The model is restored afterwards.

    Args:
        model: contains the layers.
        layers: the layers by name; each runs once in a forward pass.
        batches: read once; each takes one forward pass and K backward passes.

    Raises:
        CalibrationError: there is no batch, or a layer does not run exactly once over tokens that
            can be told apart.
    """
    factors: dict[str, KroneckerFactors] = {}
    for batch in batches:
        with _forward(model, layers, batch) as (scores, calls):
            parts = scores.detach().split(batch.items)
            chances = torch.cat([part.flatten().softmax(0).view_as(part) for part in parts])
            for number, root in enumerate(curvature_roots(chances).unbind(dim=-1)):
                for name, (inputs, gradients, kept) in calls(root):
                    if name not in factors:
                        m, d = layers[name].weight.shape
                        factors[name] = KroneckerFactors(m, d, like=inputs)
                    if number == 0:
                        factors[name].add_inputs(inputs[kept])
                    factors[name].add_gradients(gradients[kept])
    if not factors:
        raise CalibrationError("`batches` gave no sample; give at least one batch.")
    return {name: factors.pop(name).curvature() for name in [*factors]}


def covariances(
    model: nn.Module,
    layers: Layers,
    batch: ScoredBatch,
    posterior: Mapping[str, LayerCurvature],
    precision: float,
) -> list[tuple[Tensor, Tensor]]:
    """Return the logits of each item, C, and their covariance, C x C.

    The model is linearized in the layers' weights: the covariance is J (H + delta I)^(-1) J^T.

    Args:
        model: contains the layers.
        layers: as for `curvatures`.
        batch: the items.
        posterior: H of each layer.
        precision: delta.
    """
    with _forward(model, layers, batch) as (scores, calls):
        spread: dict[str, list[Tensor]] = {name: [] for name in layers}
        for one in torch.eye(scores.shape[1], device=scores.device):
            for name, (inputs, gradients, kept) in calls(one.expand_as(scores)):
                real = kept[..., None]
                jacobian = gradients.where(real, 0).mT @ inputs.where(real, 0)
                spread[name].append(posterior[name].whitened(jacobian, precision))
        logits = [part.flatten() for part in scores.detach().split(batch.items)]
        found = [each.new_zeros(len(each), len(each)) for each in logits]
        for name in layers:
            rows = torch.stack(spread.pop(name), dim=1).flatten(2)
            for covariance, part in zip(found, rows.split(batch.items), strict=True):
                item = part.flatten(0, 1).to(covariance)
                covariance.add_(item @ item.T)
    return list(zip(logits, found, strict=True))


Seen = tuple[Tensor, Tensor, Tensor]
"""A layer's inputs S x T x d, the gradients by its outputs S x T x m, both float32, and the S x T
mask of real tokens."""


@contextlib.contextmanager
def _forward(
    model: nn.Module, layers: Layers, batch: ScoredBatch
) -> Iterator[tuple[Tensor, Callable[[Tensor], Iterator[tuple[str, Seen]]]]]:
    """Run a batch; yield its scores, and each layer's gradients for a weighting of the scores.

    Raises:
        CalibrationError: a layer does not run.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    layout = token_layout(batch.inputs, model)
    with preserved(model), torch.enable_grad():
        handles = [
            layer.register_forward_hook(partial(_note, calls[name]))
            for name, layer in layers.items()
        ]
        try:
            scores = batch.scores(model(**batch.inputs))
        finally:
            for handle in handles:
                handle.remove()
        seen = {name: _only(name, scores, made) for name, made in calls.items()}
        yield scores, partial(_backward, layers, layout, seen, scores)


def _note(
    calls: list[tuple[Tensor, Tensor]], layer: nn.Module, args: Any, output: Tensor
) -> Tensor:
    # All parameters are frozen, so the first layer starts the graph.
    output = output if output.requires_grad else output.detach().requires_grad_()
    calls.append((args[0].detach(), output))
    return output


def _only(name: str, scores: Tensor, calls: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the only call of a layer that reaches the scores.

    DoRA also calls A and B for its norms, through which no gradient passes.

    Raises:
        CalibrationError: there is none, or there are several.
    """
    if not calls:
        raise CalibrationError(f"{name} did not run, so its curvature is unknown.")
    if len(calls) > 1:
        outputs = [output for _, output in calls]
        found = torch.autograd.grad(scores.sum(), outputs, retain_graph=True, allow_unused=True)
        calls = [call for call, each in zip(calls, found, strict=True) if each is not None]
    if len(calls) != 1:
        raise CalibrationError(
            f"{name} runs twice in a forward pass; its curvature has no factors."
        )
    return calls[0]


def _backward(
    layers: Layers,
    layout: TokenLayout,
    seen: Mapping[str, tuple[Tensor, Tensor]],
    scores: Tensor,
    weights: Tensor,
) -> Iterator[tuple[str, Seen]]:
    outputs = [output for _, output in seen.values()]
    found = torch.autograd.grad(
        scores, outputs, weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for (name, (given, _)), gradient in zip(seen.items(), found, strict=True):
        try:
            inputs, mask = layout.split(layers[name], given)
        except UnknownLayout:
            raise CalibrationError(
                f"{name}: its tokens cannot be assigned to samples, so its curvature is unknown."
            ) from None
        kept = inputs.new_ones(inputs.shape[:2], dtype=torch.bool)
        if mask is not None:
            kept = layout.mask_on(mask, inputs.device).bool()
        yield name, (inputs.float(), gradient.float().view(*inputs.shape[:2], -1), kept)
