"""LoRA-One: its start is a step of gradient descent, and its preconditioner the definition."""

import pytest
import torch
import transformers

from tlora.adapter.freeze import lora_layers
from tlora.calibration.batches import single_samples
from tlora.errors import CalibrationError, ConfigError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def mean_gradients(model, batches):
    """Return the mean over samples of each sample's dL/dW, float64."""
    model = model.double()
    samples = [sample for batch in batches for sample in single_samples(batch, model)]
    for sample in samples:
        (model(**sample).loss / len(samples)).backward()
    return {name: model.get_submodule(name).weight.grad for name in NAMES}


@pytest.mark.parametrize("normalize", [True, False])
def test_it_starts_after_the_best_step_of_rank_r(prepared_by, tiny_llama, batches, normalize):
    gradients = mean_gradients(tiny_llama(initializer_range=0.2), batches)
    model = tiny_llama(initializer_range=0.2)
    options = {"r": 4, "lora_alpha": 6.0, "gamma": 3.0, "normalize": normalize}
    prepared = prepared_by("lora-one", model, target_modules=NAMES, **options)
    for name, layer in lora_layers(prepared.model.base_model.model):
        a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
        u, s, vh = torch.linalg.svd(-gradients[name])
        step = 6.0 / 4**0.5 / 3.0 / (s[0] if normalize else 1.0)
        best = u[:, :4] * s[:4] @ vh[:4]
        torch.testing.assert_close(
            layer.scaling["default"] * b @ a, step * best, rtol=1e-3, atol=1e-6
        )
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-3, atol=1e-6)  # S shared evenly


def test_a_small_step_lowers_the_loss_by_its_first_order(prepared_by, tiny_llama, batches):
    model = tiny_llama(initializer_range=0.2)
    before = sum(model(**batch).loss.item() for batch in batches)
    options = {"r": 8, "gamma": 1e3, "normalize": False}
    prepared = prepared_by("lora-one", model, target_modules=NAMES, **options)
    after = sum(prepared.model(**batch).loss.item() for batch in batches)
    assert after < before


@pytest.mark.parametrize("reg", [1e-6, 0.5])
def test_the_preconditioner_is_the_definition(prepared_by, tiny_llama, batches, tmp_path, reg):
    prepared = prepared_by("lora-one", tiny_llama(), r=2, precondition=True, reg=reg)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", optim="sgd", learning_rate=1e-3
    )
    optimizer = prepared.optimizer(prepared.model, arguments)
    prepared.model(**batches[0]).loss.backward()
    wanted = []
    for _, layer in lora_layers(prepared.model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        pair = [each.detach().double() for each in (a, b, a.grad, b.grad)]
        ridge = reg * torch.eye(2, dtype=torch.float64)
        left = torch.linalg.solve(pair[1].T @ pair[1] + ridge, pair[2])
        right = torch.linalg.solve(pair[0] @ pair[0].T + ridge, pair[3].T).T
        wanted += [(a, pair[0] - 1e-3 * left), (b, pair[1] - 1e-3 * right)]
    optimizer.step()
    for found, expected in wanted:
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-3, atol=1e-5)


def test_a_module_that_no_loss_depends_on_is_named(prepared_by, tiny_llama, batches):
    with pytest.raises(CalibrationError, match="label"):
        prepared_by("lora-one", tiny_llama(), data=[{"input_ids": batches[0]["input_ids"]}])
    with pytest.raises(ConfigError, match=r"`r` is too large for .*q_proj.*exclude the module"):
        prepared_by("lora-one", tiny_llama(), r=17, target_modules=NAMES)
