"""Curvature and covariance of layers are the dense ones, where those have Kronecker factors."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tlora.adapter.freeze import lora_layers
from tlora.calibration.kfac import ScoredBatch, covariances, curvatures
from tlora.errors import CalibrationError

DELTA = 0.02


@pytest.fixture
def model(request, tiny_bert_classifier):
    names, dora = ["query", "value"], getattr(request, "param", False)
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=dora)
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_bert_classifier(), config).double()
    with torch.no_grad():  # so that a token says something about the weights
        adapted.get_parameter("base_model.model.classifier.weight").mul_(100)
    return adapted


def layers_of(model, *parts):
    return {
        f"{name}.{part}": getattr(layer, part)["default"]
        for name, layer in lora_layers(model)
        for part in parts or ("lora_A", "lora_B")
    }


def batch_of(*rows):
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    return ScoredBatch(inputs, lambda output: output.logits, [1] * len(rows))


def dense_jacobians(model, layers, batch):
    """Return the logits of all sequences, and of each layer their derivatives, scores x weights."""
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    scores = batch.scores(model(**batch.inputs)).flatten()
    weights = [layer.weight for layer in layers.values()]
    rows = [torch.autograd.grad(score, weights, retain_graph=True) for score in scores]
    found = [torch.stack([g.flatten() for g in column]) for column in zip(*rows, strict=True)]
    return scores.detach(), dict(zip(layers, found, strict=True))


@pytest.mark.parametrize("model", [False, True], indirect=True, ids=["lora", "dora"])
@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_B",)])
def test_the_posterior_is_the_dense_one_of_a_single_token(model, parts):
    """One sample of one token: the Gauss-Newton matrix of a layer is a Kronecker product."""
    layers = layers_of(model, *parts)
    fits, asked = batch_of([5]), batch_of([7, 8, 9], [4, 3])
    posterior = curvatures(model, layers, [fits])
    found = covariances(model, layers, asked, posterior, DELTA)
    scores, jacobians = dense_jacobians(model, layers, fits)
    chances = scores.softmax(0)
    hessian = chances.diag() - torch.outer(chances, chances)
    logits, asked_jacobians = dense_jacobians(model, layers, asked)
    wanted = torch.zeros(2, len(scores), len(scores), dtype=torch.float64)
    unfitted = wanted.clone()
    for name, jacobian in jacobians.items():
        precision = jacobian.T @ hessian @ jacobian
        precision += DELTA * torch.eye(len(precision), dtype=torch.float64)
        each = asked_jacobians[name].unflatten(0, (2, -1))
        wanted += each @ torch.linalg.solve(precision, each.mT)
        unfitted += each @ each.mT / DELTA
    torch.testing.assert_close(torch.stack([v for _, v in found]), wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.cat([f for f, _ in found]), logits)
    assert (wanted - unfitted).norm() > 0.05 * unfitted.norm()  # the token says something


def test_padding_and_batches_do_not_count(model):
    layers = layers_of(model)
    rows = ([5, 6, 7, 8], [9], [3, 4])
    together = curvatures(model, layers, [batch_of(*rows)])
    alone = curvatures(model, layers, [batch_of(row) for row in rows])
    for name, layer in together.items():
        torch.testing.assert_close(layer.eigenvalues, alone[name].eigenvalues, atol=1e-7, rtol=1e-4)
    padded = covariances(model, layers, batch_of(*rows), together, DELTA)
    for row, (logits, covariance) in zip(rows, padded, strict=True):
        ((plain, own),) = covariances(model, layers, batch_of(row), together, DELTA)
        torch.testing.assert_close(logits, plain)
        torch.testing.assert_close(covariance, own, rtol=1e-4, atol=1e-8)


def test_of_choices_each_sequence_scores_one(model):
    """Choices of one item in sequences of their own vary together, as its logits do."""
    layers = layers_of(model)
    rows = ([5, 6], [7, 8], [9, 4])
    batch = batch_of(*rows)
    chosen = ScoredBatch(batch.inputs, lambda output: output.logits[:, :1], [2, 1])
    posterior = curvatures(model, layers, [chosen])
    (two, one) = covariances(model, layers, chosen, posterior, DELTA)
    assert (two[1].shape, one[1].shape) == ((2, 2), (1, 1))
    scores, jacobians = dense_jacobians(model, layers, chosen)
    torch.testing.assert_close(torch.cat([two[0], one[0]]), scores)
    # Where the prior is all, the covariance is J J^T / delta.
    (wide, _) = covariances(model, layers, chosen, posterior, 1e9)
    wanted = sum(jacobian[:2] @ jacobian[:2].T for jacobian in jacobians.values()) / 1e9
    torch.testing.assert_close(wide[1], wanted, rtol=1e-4, atol=1e-15)


def test_the_model_comes_back_as_it_was(model):
    layers = layers_of(model)
    model.train()
    model.requires_grad_(True)
    with pytest.raises(CalibrationError, match="gave no sample"):
        curvatures(model, layers, [])
    curvatures(model, layers, [batch_of([5, 6])])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_hooks for layer in layers.values())


def test_a_layer_that_does_not_run_is_named(model):
    layers = layers_of(model) | {"elsewhere": torch.nn.Linear(2, 2)}
    with pytest.raises(CalibrationError, match="elsewhere did not run"):
        curvatures(model, layers, [batch_of([5, 6])])
