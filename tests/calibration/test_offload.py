"""Models that accelerate offloads: the statistics of the loaded model, a few weights at a time."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import support
from offloaded_bases import WAYS, Loaded, is_offloaded, on_disk
from support import Family, Toy, make_family, toy_batch, toy_samples
from tlora import Calibration, TLoraConfig, calibrate, plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration import hooks
from tlora.calibration.placement import saved_by_reference
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight
from tlora.errors import AdapterError, CalibrationError

FAMILIES = ["gpt2-right", "t5"]


def config(family: Family | None = None, **fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2, "lora_alpha": 2} | (family.config if family else {}) | fields))


def assert_same(left: Calibration, right: Calibration) -> None:
    assert list(left) == list(right)
    for name, module in left.modules.items():
        other = right.modules[name]
        assert module.sensitivity == other.sensitivity, name
        assert torch.equal(module.covariance(), other.covariance()), name


@pytest.fixture(params=list(WAYS))
def way(request: Any) -> Any:
    return WAYS[request.param]


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_and_plan_are_those_of_the_loaded_model_to_the_bit(name, way, tmp_path, request):
    family = make_family(name, request.getfixturevalue)
    fields = config(family)
    batches = family.batches(2)
    loaded = copy.deepcopy(family.model)
    model = way(family.model, tmp_path)
    if way is WAYS["map"]:
        # Weights in a mapped file lie elsewhere within a cache line, and that moves the last bit.
        loaded = type(loaded).from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    expected = calibrate(loaded, batches, fields)
    planned = plan(loaded, expected, fields)
    needs = [p.requires_grad for p in model.parameters()]

    stats = calibrate(model, batches, fields)
    found = plan(model, stats, fields)
    in_blocks = config(family, memory_budget=1, covariance="exact")
    blocks = plan_in_blocks(model, batches, in_blocks)

    assert_same(stats, expected)
    for module, want in planned.modules.items():
        assert torch.equal(found.modules[module].lora_A, want.lora_A)
        assert torch.equal(blocks.modules[module].lora_A, want.lora_A)
        assert found.modules[module].captured_energy == want.captured_energy
    assert blocks.info["passes"] > 1
    assert is_offloaded(model)
    assert [p.requires_grad for p in model.parameters()] == needs


def deep_llama(tiny_llama: Any) -> Any:
    return tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=6)


def test_a_few_weights_are_alive_at_a_time_in_both_passes(tiny_llama, tmp_path, monkeypatch):
    model = on_disk(deep_llama(tiny_llama), tmp_path)
    seen = Loaded(model)
    stats = calibrate(model, support.in_batches(support.causal_samples(), 5), config())
    planned = plan(model, stats, config())

    assert len(planned) == 42
    # Each batch loads every weight for its forward pass, for S, and for the gradient to the input.
    assert seen.times >= 3 * len(stats)
    assert seen.peak <= 2
    assert seen.alive == 0

    # What it would be: all of them.
    monkeypatch.setattr(hooks, "saved_by_reference", lambda _: contextlib.nullcontext())
    model = on_disk(deep_llama(tiny_llama), tmp_path / "again")
    seen = Loaded(model)
    calibrate(model, support.causal_samples(), config())
    assert seen.peak >= 40


class Casts(TorchDispatchMode):
    """Counts the casts of 32 x 32 matrices to bfloat16 that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            if out.shape == (32, 32):
                self._alive.append(StorageWeakRef(out.untyped_storage()))
            self._alive = [each for each in self._alive if not each.expired()]
            self.most = max(self.most, len(self._alive))
        return out


def test_casts_of_weights_under_autocast_are_not_kept_either(tiny_llama, tmp_path, monkeypatch):
    loaded, batches = deep_llama(tiny_llama), support.causal_samples()
    model = on_disk(copy.deepcopy(loaded), tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        expected = calibrate(loaded, batches, config())
        with Casts() as casts:
            stats = calibrate(model, batches, config())
        assert_same(stats, expected)
        assert 1 <= casts.most <= 3

        monkeypatch.setattr(hooks, "saved_by_reference", lambda _: contextlib.nullcontext())
        with Casts() as casts:
            calibrate(model, batches, config())
        assert casts.most >= 25


def test_a_model_that_is_not_offloaded_saves_its_own_tensors(tiny_llama):
    model, [batch] = tiny_llama(), support.in_batches(support.causal_samples(), 5)
    with saved_by_reference(model):
        assert not model._forward_hooks
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        model(**batch).loss.backward()


@pytest.mark.parametrize("fault", ["forward", "deep", "nan"])
def test_a_batch_that_fails_leaves_the_model_offloaded(tiny_llama, tmp_path, fault):
    model = on_disk(tiny_llama(), tmp_path).train()
    model.model.norm.weight.requires_grad_(False)
    batches = support.causal_samples()
    expected: type[BaseException] = CalibrationError
    if fault == "forward":
        batches[1]["input_ids"][0, 0] = 10_000
        expected = CalibrationError
    if fault == "deep":

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        # Inside the call of the module, whose weight is loaded then.
        model.model.layers[1].mlp.down_proj._old_forward = fail
        expected = ZeroDivisionError
    if fault == "nan":
        batches[1]["labels"][:] = -100
    needs = {name: p.requires_grad for name, p in model.named_parameters()}

    with pytest.raises(expected):
        calibrate(model, batches, config())

    assert is_offloaded(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class SharedForSequenceClassification(Toy):
    """Calls one offloaded module twice, with a weight of its own that another module reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self.first(self.first(x * self.scale).tanh()).tanh()


def test_a_parent_with_parameters_of_its_own_and_a_module_called_twice(tmp_path):
    model = support.seeded(SharedForSequenceClassification)
    batches = [toy_batch(toy_samples())]
    expected = calibrate(model, batches, config())
    model = on_disk(model, tmp_path)
    seen = Loaded(model)
    assert_same(calibrate(model, batches, config()), expected)
    assert is_offloaded(model)
    assert seen.peak <= 3


def test_a_weight_loaded_by_an_outer_module_is_refused_where_it_is_a_target(tiny_llama, tmp_path):
    def preloaded() -> Any:
        # One hook on each LlamaMLP loads what its three Linears need.
        return accelerate.disk_offload(
            tiny_llama(), str(tmp_path / "all"), preload_module_classes=["LlamaMLP"]
        )

    with pytest.raises(CalibrationError, match=r"gate_proj: .*`preload_module_classes`"):
        calibrate(preloaded(), support.causal_samples(), config())

    attention = config(target_modules=["q_proj", "o_proj"])
    expected = calibrate(tiny_llama(), support.causal_samples(), attention)
    model = preloaded()
    seen = Loaded(model)
    assert_same(calibrate(model, support.causal_samples(), attention), expected)
    assert is_offloaded(model)
    assert seen.peak <= 5


def test_a_saved_calibration_fits_the_model_loaded_anew(request, way, tmp_path):
    # GPT-2's head is tied to its embedding; a call of the offloaded model unties them.
    family = make_family("gpt2-right", request.getfixturevalue)
    fields, folder = config(), tmp_path / "new"
    fresh = copy.deepcopy(family.model)
    stats = calibrate(way(family.model, tmp_path), family.batches(2), fields)
    loaded = Calibration.load(stats.save(tmp_path))
    plan(way(fresh, folder), loaded, fields)


def test_reading_a_weight_that_nobody_loads_is_refused(tiny_llama):
    with pytest.raises(AdapterError, match="is on `meta`; load the model"):
        dense_weight(find_targets(tiny_llama().to("meta"), config())[0])
