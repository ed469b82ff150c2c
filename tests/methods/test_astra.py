"""Astra: its start is the definition on every real token of the outputs."""

import pytest
import torch

from tlora.adapter.freeze import lora_layers
from tlora.calibration.batches import single_samples

LLAMA = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]


def outputs(model, batches, names):
    """Return every module's outputs on all real tokens, tokens x m float64: one sample a pass."""
    seen = {name: [] for name in names}

    def keep(name):
        return lambda module, args, output: seen[name].append(output.detach().flatten(0, -2))

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    with torch.no_grad():
        for batch in batches:
            for sample in single_samples(batch, model):
                model(**sample)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_it_starts_from_the_weight_along_the_outputs(prepared_by, tiny_llama, batches, end):
    # With a bias, which moves the outputs' directions.
    model = tiny_llama(initializer_range=0.2, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    weights = {name: model.get_submodule(name).weight.detach().double() for name in LLAMA}
    found = outputs(model, batches, LLAMA)
    options = {"r": 3, "lora_alpha": 6, "eigenvalues": end}
    prepared = prepared_by("astra", model, target_modules=LLAMA, **options)
    for name, layer in lora_layers(prepared.model.base_model.model):
        _, _, vh = torch.linalg.svd(found[name])
        q = (vh[:3] if end == "largest" else vh[-3:]).T
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        torch.testing.assert_close(b @ b.T, q @ q.T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a, b.T @ weights[name], rtol=1e-5, atol=1e-6)
        base = layer.get_base_layer().weight.double()
        torch.testing.assert_close(base, weights[name] - 2 * b @ a, rtol=1e-5, atol=1e-6)


def test_16_bit_outputs_count_as_the_numbers_they_are(prepared_by, tiny_llama, batches):
    model = tiny_llama(initializer_range=0.2).bfloat16()
    found = outputs(model, batches, LLAMA[:1])[LLAMA[0]]
    prepared = prepared_by("astra", model, r=2, target_modules=LLAMA[:1])
    ((_, layer),) = lora_layers(prepared.model.base_model.model)
    b = layer.lora_B["default"].weight.double()
    kept = float((found @ b).square().sum() / found.square().sum())
    best = torch.linalg.svdvals(found).square()
    assert kept == pytest.approx(float(best[:2].sum() / best.sum()), rel=1e-2)


def test_a_resumed_run_reads_no_batch(prepared_by, tiny_llama):
    first = prepared_by("astra", tiny_llama(initializer_range=0.2), r=2)
    again = prepared_by("astra", tiny_llama(initializer_range=0.2), first.plan, data=[], r=2)
    state = first.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.model.state_dict().items())
