"""Modules are solved together where that pays, and come out as they do one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

import support
from tlora import TLoraConfig, calibrate, plan
from tlora.adapter import planning
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.statistics import Calibration, ModuleStatistics
from tlora.linalg import orthogonal
from tlora.linalg.moments import SecondMoment


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(orthogonal, "BATCHED", {"cpu"})


def llama(layers: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return support.seeded(lambda: transformers.LlamaForCausalLM(config))


BATCHES = support.in_batches(support.causal_samples((27, 23, 30, 25, 22)), 2)
FIELDS = {"r": 4, "allocate_rank": False, "subspace": "randomized"}


class Reads(TorchFunctionMode):
    """Counts the reads of tensors by the host."""

    WAYS = tuple(getattr(torch.Tensor, n) for n in ("item", "tolist", "__bool__", "__float__"))

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.WAYS or func is torch.linalg.eigh
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("basis", ["weight-covariance", "random"])
def test_the_host_reads_no_more_often_for_many_layers_than_for_one(basis):
    counts = []
    for layers in (1, 3):
        model, config = llama(layers), TLoraConfig(**FIELDS, basis=basis)
        stats = calibrate(model, BATCHES, config, progress=False)
        with Reads() as reads:
            planned = plan(model, stats, config, progress=False)
        assert len(planned.modules) == 7 * layers
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("fields", [{}, {"covariance": "streamed"}, {"basis": "random"}], ids=str)
def test_modules_solved_together_are_those_solved_one_by_one(fields, monkeypatch):
    model = llama(2)
    config = TLoraConfig(r=4, subspace="randomized", **fields)
    sizes: list[int] = []
    real = planning._batches

    def noted(rounds):
        found = list(real(rounds))
        sizes.extend(map(len, found))
        return found

    monkeypatch.setattr(planning, "_batches", noted)
    together = plan_in_blocks(model, BATCHES, config)
    assert max(sizes) == 14
    sizes.clear()
    monkeypatch.setattr(planning, "BATCH_BYTES", 0)
    alone = plan_in_blocks(model, BATCHES, config)
    assert max(sizes) == 1
    for name, module in together.modules.items():
        other = alone.modules[name]
        # An accelerator's batches may round otherwise; on a CPU every module is alone.
        torch.testing.assert_close(module.lora_A, other.lora_A, atol=1e-5, rtol=0)
        if fields != {"basis": "random"}:  # which has no moments to measure by
            assert module.captured_energy == pytest.approx(other.captured_energy, rel=1e-6)
        assert (module.rank, module.solver) == (other.rank, other.solver)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_base_of_any_float_dtype_is_planned_from_the_same_numbers(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)).to(dtype)
    config = TLoraConfig(r=6, target_modules=["0", "1"], allocate_rank=False, allocate_scale=False)
    moments = {}
    for name, layer in model.named_children():
        moments[name] = SecondMoment(layer.in_features)
        moments[name].update(torch.randn(2, 5, layer.in_features))

    def planned(base):
        rows = [
            ModuleStatistics(name, layer.in_features, layer.out_features, 2, None, moments[name])
            for name, layer in base.named_children()
        ]
        return plan(base, Calibration({row.name: row for row in rows}, 2), config)

    found, expected = planned(model), planned(copy.deepcopy(model).float())
    for name, module in found.modules.items():
        torch.testing.assert_close(module.lora_A, expected.modules[name].lora_A, atol=1e-4, rtol=0)
