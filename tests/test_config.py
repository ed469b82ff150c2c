"""The configuration record and the error tree."""

from __future__ import annotations

import json
from typing import Any, get_args

import peft
import pytest

from tlora import errors
from tlora.config import REFUSED_OPTIONS, TaskType, TLoraConfig, parse_bytes
from tlora.errors import ConfigError, TLoraError, did_you_mean
from tlora.registry import METHODS

NOT_DEFAULT: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 12.5,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": "lm_head",
    "target_parameters": [],
    "layers_to_transform": [0, 3],
    "layers_pattern": "layers",
    "lora_dropout": 0.1,
    "modules_to_save": ["classifier"],
    "trainable_token_indices": {"embed_tokens": [3]},
    "ensure_weight_tying": True,
    "bias": "lora_only",
    "task_type": "SEQ_CLS",
    "basis": "random",
    "whiten": True,
    "allocate_rank": False,
    "allocate_scale": False,
    "sensitivity_rule": "fisher",
    "scale_rule": "proportional",
    "freeze_a": False,
    "budget": "params",
    "rank_min": 2,
    "rank_max": 64,
    "covariance": "exact",
    "subspace": "randomized",
    "memory_budget": "2GiB",
    "seed": 3,
}


def faults_of(**values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        TLoraConfig(**values)
    return caught.value.faults


def test_the_defaults_are_the_paper_s_method() -> None:
    config = TLoraConfig()
    assert config.basis == "weight-covariance"
    assert config.allocate_rank
    assert config.allocate_scale
    assert config.scale_rule == "released"
    assert config.freeze_a
    assert not config.whiten
    assert (config.r, config.lora_alpha, config.rank_min, config.rank_max) == (8, 8, 1, None)


def test_every_field_survives_a_round_trip_through_json() -> None:
    assert set(NOT_DEFAULT) == set(TLoraConfig.field_names())
    assert not [
        name for name, value in TLoraConfig().to_dict().items() if NOT_DEFAULT[name] == value
    ]
    for config in (TLoraConfig(), TLoraConfig(**NOT_DEFAULT)):
        plain = json.loads(json.dumps(config.to_dict()))
        assert TLoraConfig.from_dict(plain) == config
    assert TLoraConfig(**NOT_DEFAULT).to_dict() == NOT_DEFAULT


def test_the_task_types_are_pefts() -> None:
    assert set(get_args(TaskType)) == {kind.value for kind in peft.TaskType}


def test_what_peft_users_write_is_taken() -> None:
    config = TLoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        target_modules=("q_proj", "v_proj"),
        exclude_modules={"b", "a"},
        modules_to_save="head, score",
    )
    assert type(config.task_type) is str
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.exclude_modules == ["a", "b"]
    assert config.modules_to_save == ["head", "score"]
    assert TLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_parameters_go_without_dropout() -> None:
    (fault,) = faults_of(target_parameters=["experts.down_proj"], lora_dropout=0.1)
    assert "`lora_dropout` does not work with `target_parameters`" in fault
    assert not TLoraConfig(target_parameters=[], lora_dropout=0.1).target_parameters


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layers_to_transform": 0}, "`layers_to_transform` needs `target_modules` as a list"),
        (
            {"layers_to_transform": [0], "target_modules": "all-linear"},
            "not 'all-linear'; give a list, or None for PEFT's default.",
        ),
        ({"layers_pattern": "h"}, "`layers_pattern` needs `target_modules` as a list of names"),
        (
            {"layers_pattern": "h", "target_modules": ["q_proj"]},
            "`layers_pattern` needs `layers_to_transform`; give both or neither.",
        ),
        ({"target_modules": []}, "`target_modules` is []; name a module to adapt."),
        (
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": "lm_head"},
            "`target_modules` and `modules_to_save` both name 'lm_head'",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_work_together_are_one_fault(
    fields: dict[str, Any], sentence: str
) -> None:
    methods = [METHODS.load(name) for name in METHODS.names()]
    records = [m.options for m in methods if set(fields) <= set(m.options.field_names())]
    assert TLoraConfig in records
    for record in records:
        with pytest.raises(ConfigError) as caught:
            record(**fields)
        (fault,) = caught.value.faults
        assert sentence in fault


def test_a_name_alone_is_a_list_of_one_in_every_method() -> None:
    names = "modules_to_save", "target_parameters", "query_modules", "value_modules"
    checked = 0
    for name in METHODS.names():
        record = METHODS.load(name).options
        for field in set(names) & set(record.field_names()):
            assert getattr(record(**{field: "lm_head"}), field) == ["lm_head"]
            checked += 1
        if "target_modules" in record.field_names():
            assert record(target_modules="q_proj").target_modules == "q_proj"
    assert checked > len(METHODS.names())


def test_no_method_takes_a_negative_scale() -> None:
    for name in METHODS.names():
        record = METHODS.load(name).options
        if "lora_alpha" in record.field_names():
            with pytest.raises(ConfigError, match="`lora_alpha` is -1; give a positive number"):
                record(lora_alpha=-1)


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_a_refused_option_says_why(name: str) -> None:
    (fault,) = faults_of(**{name: True})
    assert f"`{name}` is refused" in fault
    assert REFUSED_OPTIONS[name] in fault
    assert len(REFUSED_OPTIONS[name].split()) >= 6


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (12345, 12345),
        ("1e9", 10**9),
        ("2gib", 2 * 2**30),
        ("512 MB", 512 * 10**6),
        (" 1.5 KiB ", 1536),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(value: int | str, size: int) -> None:
    assert parse_bytes(value) == size
    assert TLoraConfig(memory_budget=value).memory_budget_bytes == size


def test_a_saved_null_stays_no_limit_and_the_default_is_automatic() -> None:
    saved = TLoraConfig().to_dict() | {"memory_budget": None}
    config = TLoraConfig.from_dict(saved)
    assert (config.memory_budget, config.bounds_moments) == (None, False)
    assert config.to_dict() == saved
    assert (TLoraConfig().memory_budget, TLoraConfig().bounds_moments) == ("auto", False)
    assert TLoraConfig(memory_budget="1GiB").bounds_moments


@pytest.mark.parametrize("value", [0, -1, True, "", "GB", "-2GB", "2 XB", "two", "0", "1e400"])
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(value)


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, True),
        ({"allocate_rank": False}, True),
        ({"allocate_scale": False}, True),
        ({"allocate_rank": False, "allocate_scale": False}, False),
        ({"allocate_rank": False, "scale_rule": "constant"}, False),
        ({"scale_rule": "constant"}, True),
    ],
)
def test_sensitivity_is_needed_by_either_allocation(values: dict, needed: bool) -> None:
    assert TLoraConfig(**values).needs_sensitivity is needed


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        ("ConfigError", ValueError),
        ("CalibrationError", RuntimeError),
        ("PlanError", ValueError),
        ("AdapterError", RuntimeError),
        ("DataError", ValueError),
        ("ArtifactError", OSError),
    ],
)
def test_errors_are_caught_as_ours_and_as_the_builtin(kind: str, builtin: type) -> None:
    error = getattr(errors, kind)("what was wrong")
    assert isinstance(error, TLoraError)
    assert isinstance(error, builtin)
    assert "what was wrong" in str(error)


def test_did_you_mean_suggests_only_what_is_close() -> None:
    assert did_you_mean("metamaht", ["gsm8k", "metamath"]) == " Did you mean 'metamath'?"
    assert did_you_mean("metamath", []) == ""
    assert did_you_mean("xyz", ["gsm8k", "metamath"]) == ""


def test_names_with_commas_are_modules_and_no_regex():
    given = TLoraConfig(target_modules="q_proj,v_proj", exclude_modules=r"layers\.\d{1,2}\.k_proj")
    assert given.target_modules == ["q_proj", "v_proj"]
    assert given.exclude_modules == r"layers\.\d{1,2}\.k_proj"
