"""What tells calibrations apart, and what it cannot see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import support
from tlora import Calibration, TLoraConfig, calibrate, plan
from tlora.calibration.statistics import batch_digest, model_key
from tlora.calibration.targets import find_targets
from tlora.errors import PlanError


def data_key(batches: list[Any]) -> tuple[str, ...]:
    return tuple(map(batch_digest, batches))


# --- the model


def test_a_model_has_one_key_wherever_and_however_often_it_is_made(tiny_llama):
    model = tiny_llama()
    key = model_key(model)
    assert key == model_key(tiny_llama()) == model_key(model.train())
    model.requires_grad_(False)
    assert model_key(model) == key


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_other_parameters_are_another_model(tiny_llama, name):
    model = tiny_llama()
    key = model_key(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(1 + 2**-20)
    assert model_key(model) != key


def test_other_names_shapes_and_dtypes_are_another_model():
    def keyed(**layers: nn.Module) -> str:
        model = nn.ModuleDict(layers)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        return model_key(model)

    keys = {
        keyed(a=nn.Linear(4, 6)),
        keyed(b=nn.Linear(4, 6)),
        keyed(a=nn.Linear(6, 4)),
        keyed(a=nn.Linear(4, 6, dtype=torch.bfloat16)),
        keyed(a=nn.Linear(4, 6), b=nn.Linear(4, 6)),
    }
    assert len(keys) == 5


def test_a_parameter_of_any_layout_and_dtype_is_read():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.strided = nn.Parameter(torch.arange(12.0).view(3, 4).T)
            self.scalar = nn.Parameter(torch.tensor(1.0))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.packed = nn.Parameter(torch.arange(9, dtype=torch.uint8), requires_grad=False)
            self.away = nn.Parameter(torch.zeros(3, device="meta"))

    model = Odd()
    key = model_key(model)
    model.packed.data[8] = 1
    assert model_key(model) != key


# --- the samples


def test_order_content_names_and_batching_count():
    samples = support.causal_samples((4, 4, 4))
    changed = [s | {"labels": s["labels"].clone()} for s in samples]
    changed[2]["labels"][0, -1] += 1
    renamed = [{f"{k}_": v for k, v in s.items()} for s in samples]
    keys = {
        data_key(batches)
        for batches in (
            samples,
            samples[::-1],
            samples[:2],
            changed,
            renamed,
            [s | {"apart": True} for s in samples],
            [{k: v.int() for k, v in s.items()} for s in samples],
            support.in_batches(samples, 3),
        )
    }
    assert len(keys) == 8
    shuffled = [dict(sorted(s.items(), reverse=True)) for s in samples]
    assert data_key(shuffled) == data_key(samples)


# --- the configuration


def test_less_than_is_needed_will_not_do(tiny_llama):
    model, samples = tiny_llama(), support.causal_samples((4, 5))
    flat = {"allocate_rank": False, "allocate_scale": False}
    for fields in ({"basis": "random"}, flat, {"sensitivity_rule": "fisher"}):
        stats = calibrate(model, samples, TLoraConfig(**fields))
        assert stats.lacks(list(stats), TLoraConfig(**fields)) == []
        assert stats.lacks(list(stats), TLoraConfig()) == ["it lacks required statistics"]
    assert stats.lacks(["lm_head"], TLoraConfig(sensitivity_rule="fisher")) == ["other modules"]


# --- planning


def test_statistics_of_another_model_are_not_planned_from(tiny_llama, tmp_path):
    model = tiny_llama(initializer_range=0.2)
    config = TLoraConfig(r=2)
    stats = calibrate(model, support.causal_samples(), config)
    loaded = Calibration.load(stats.save(tmp_path))
    assert loaded.key == stats.key
    for fields in (
        {"r": 3},
        {"budget": "params"},
        {"basis": "random"},
        {"whiten": True},
        {"allocate_rank": False},
        {"target_modules": ["q_proj"]},
    ):
        assert plan(model, loaded, TLoraConfig(**({"r": 2} | fields))).modules

    with torch.no_grad():
        find_targets(model, config)[3].module.weight.mul_(2)
    for one in (stats, loaded):
        with pytest.raises(PlanError, match=r"another model \(LlamaForCausalLM.*calibrate this"):
            plan(model, one, config)
    loaded.key = None
    assert plan(model, loaded, config).modules


def test_what_lies_inside_lists_dicts_and_arrays_counts():
    def keys(make):
        return {data_key([make(torch.full((2,), float(n)))]) for n in (0, 0, 1)}

    for make in (
        lambda x: {"images": [x, x]},
        lambda x: {"sizes": {"a": x}},
        lambda x: {"pixels": x.numpy()},
        lambda x: {"images": [x.numpy()]},
        lambda x: {"number": x[0].item()},
    ):
        assert len(keys(make)) == 2
    assert data_key([{"a": [1, [2]]}]) != data_key([{"a": [1, 2]}])


def test_objects_of_a_type_are_alike_wherever_they_lie():
    assert data_key([{"a": object()}]) == data_key([{"a": object()}]) != data_key([{"a": None}])
