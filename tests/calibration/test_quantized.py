"""Statistics and subspaces of quantized bases, on the CPU, by the real libraries."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import quantized_bases
import support
from quantized_bases import FORMS, same_bits, stored
from support import assert_agrees, one_at_a_time
from tlora import Calibration, TLoraConfig, calibrate, plan
from tlora.calibration import weights
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight
from tlora.errors import AdapterError, CalibrationError
from tlora.linalg.subspace import captured_energy

CONFIG = TLoraConfig(r=8, lora_alpha=8, subspace="exact")

# Largest relative Frobenius distance of a weight from the full-precision one. On the demo's base:
# smallest rank correlation of the sensitivities with full precision's, largest relative change of
# one of them, and smallest ratio of captured energies (below); measured: nf4 0.999, 0.14, 0.976;
# int8 and torchao 0.999, 0.01, 0.9998; hqq 0.999, 0.06, 0.982.
CLOSE = {
    "nf4": (0.1, 0.99, 0.2, 0.97),
    "nf4-plain": (0.1, 0.99, 0.2, 0.97),
    "nf4-in-floats": (0.1, 0.99, 0.2, 0.97),
    "int8": (0.01, 0.999, 0.02, 0.999),
    "torchao": (0.01, 0.999, 0.02, 0.999),
    "hqq": (0.1, 0.99, 0.1, 0.98),
}


@pytest.fixture(scope="module")
def folder(saved, tiny_llama) -> str:
    """A saved Llama of hidden size 64, a block of 4-bit weights."""
    return saved(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2))


@pytest.fixture(params=list(FORMS))
def form(request: Any) -> str:
    return request.param


def dequantized(model: nn.Module, folder: str) -> nn.Module:
    """A float model of the very weights that a quantized one stands for."""
    plain = quantized_bases.full(folder)
    for target in find_targets(model, CONFIG):
        plain.get_submodule(target.name).weight.data = dense_weight(target)
    return plain


def batches(size: int) -> list[support.Sample]:
    return support.in_batches(support.causal_samples(), size)


def test_the_weight_that_is_read_is_the_one_that_multiplies(folder, form):
    model = quantized_bases.load(folder, form).train()
    before = stored(model)
    full = {t.name: dense_weight(t) for t in find_targets(quantized_bases.full(folder), CONFIG)}
    for target in find_targets(model, CONFIG):
        weight = dense_weight(target)
        assert weight.shape == (target.d_out, target.d_in)
        assert weight.dtype == torch.float32
        assert type(weight) is torch.Tensor
        assert not weight.requires_grad
        assert support.distance(target.module(torch.eye(target.d_in)).T, weight) < 1e-6
        assert 1e-4 < support.distance(weight, full[target.name]) < CLOSE[form][0]
        # Read again after the call, which moves 8-bit scales to another place.
        assert torch.equal(dense_weight(target), weight)
    assert same_bits(before, stored(model))


def test_statistics_are_those_of_the_dequantized_model(folder, form):
    model = quantized_bases.load(folder, form)
    before, modes = stored(model), [module.training for module in model.modules()]

    stats = calibrate(model, batches(5), CONFIG)

    plain = dequantized(model, folder)
    assert_agrees(stats, one_at_a_time(plain, support.causal_samples(), stats.modules))
    assert same_bits(before, stored(model))
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.requires_grad for t in _modules(model) for parameter in t.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def demo() -> tuple[Any, list[support.Sample], Calibration]:
    """The demo's base in full precision, 16 of its samples, and their statistics."""
    from tlora.demo.run import BASE_MODEL

    model = quantized_bases.full(BASE_MODEL).eval()
    inputs = support.in_batches(support.demo_samples(16), 8)
    return model, inputs, calibrate(model, inputs, CONFIG)


def test_how_close_a_quantized_base_is_to_full_precision(demo, form):
    full, inputs, expected = demo
    _, rank, change, energy = CLOSE[form]
    model = quantized_bases.load(full.name_or_path, form)

    stats = calibrate(model, inputs, CONFIG)

    pairs = [(stats.modules[n].sensitivity, m.sensitivity) for n, m in expected.modules.items()]
    correlation = spearmanr(*zip(*pairs, strict=True)).statistic
    changes = [abs(ours / theirs - 1) for ours, theirs in pairs]
    uniform = TLoraConfig(r=8, lora_alpha=8, subspace="exact", allocate_rank=False)
    ours, best = plan(model, stats, uniform), plan(full, expected, uniform)
    ratios = []
    for target in find_targets(full, CONFIG):
        product = expected.modules[target.name].weighted(dense_weight(target))
        kept = [captured_energy(product, p.modules[target.name].lora_A) for p in (ours, best)]
        ratios.append(kept[0] / kept[1])
    assert correlation > rank
    assert max(changes) < change
    # Under full precision's W C, of what its own best subspace of that rank keeps.
    assert energy < min(ratios) <= max(ratios) < 1 + 1e-6


def test_one_dequantized_weight_is_alive_at_a_time(folder, form, monkeypatch):
    alive: list[Any] = []
    most: list[int] = []

    def counted(read):
        def wrapped(module):
            most.append(1 + sum(reference() is not None for reference in alive))
            weight = read(module)
            alive.append(weakref.ref(weight))
            return weight

        return wrapped

    rows = [copy.copy(row) for row in weights._STORAGES]
    for row in rows:
        object.__setattr__(row, "read", counted(row.read))
    monkeypatch.setattr(weights, "_STORAGES", tuple(rows))
    model = quantized_bases.load(folder, form)

    stats = calibrate(model, batches(5), CONFIG)
    plan(model, stats, CONFIG)

    assert len(most) >= 2 * len(stats)
    assert max(most) == 1


def _modules(model: nn.Module) -> list[nn.Module]:
    return [target.module for target in find_targets(model, CONFIG)]


def _rewrite(layer: Any) -> None:
    """What bitsandbytes does to a 4-bit layer in eval mode on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    state = layer.weight.quant_state
    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, state)


@pytest.mark.parametrize("form", ["nf4", "nf4-plain"])
def test_weights_rewritten_for_inference_are_refused(folder, form):
    model = quantized_bases.load(folder, form)
    stats = calibrate(model, batches(5), CONFIG)
    first = find_targets(model, CONFIG)[0]
    _rewrite(first.module)

    with pytest.raises(CalibrationError, match=rf"{first.name}: .*gradients no longer pass.*load"):
        calibrate(model, batches(5), CONFIG)
    with pytest.raises(AdapterError, match=rf"{first.name}: .*eval mode.*reload the model"):
        plan(model, stats, CONFIG)


@pytest.mark.parametrize("form", ["nf4", "nf4-plain"])
def test_the_switch_of_the_inference_kernel_is_as_it_was(folder, form):
    model = quantized_bases.load(folder, form)
    for layer, value in zip(_modules(model), [True, False] * 7, strict=True):
        layer.support_avx512bf16_for_cpu = value
    bad = batches(5)
    bad[0]["labels"] = torch.full_like(bad[0]["labels"], -100)

    calibrate(model, batches(5), CONFIG)
    with pytest.raises(CalibrationError):
        calibrate(model, bad, CONFIG)

    switches = [layer.support_avx512bf16_for_cpu for layer in _modules(model)]
    assert switches == [True, False] * 7
