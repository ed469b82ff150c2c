"""Names and layer indexes that no module of the model has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import support
from tlora import TLoraConfig, get_tlora_model
from tlora.calibration.targets import find_targets
from tlora.errors import ConfigError
from tlora.registry import METHODS

WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"modules_to_save": "lm_haed"},
        "`modules_to_save` names 'lm_haed', but no module of LlamaForCausalLM has this name."
        " Did you mean 'lm_head'?",
    ),
    ({"modules_to_save": ["ead"]}, "`modules_to_save` names 'ead', but no module"),
    ({"modules_to_save": [""]}, "`modules_to_save` names '', but no module"),
    ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj', but no module of LlamaForCausalLM"),
    ({"target_modules": "q_proj"}, "a regex of full names; give names as a list: [q_proj]."),
    ({"exclude_modules": ["q_prj"]}, "`exclude_modules` names 'q_prj', but no module"),
    ({"exclude_modules": "q_proj"}, "give names as a list: [q_proj]."),
    (
        {"exclude_modules": ["mlp"]},
        "`exclude_modules` names 'mlp', but PEFT still adapts the modules inside it; name these,"
        " or give the regex '.*mlp.*'.",
    ),
    ({"query_modules": ["q_proj", "w_proj"]}, "`query_modules` names 'w_proj', but no module"),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        "`layers_to_transform` names 2, but the layers of the target modules are 0 to 1.",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layer"},
        "`layers_pattern` is 'layer', which matches no list of layers; choose one of: layers."
        " Did you mean 'layers'?",
    ),
    ({"target_parameters": "experts.down"}, "`target_modules` adapts Linears"),
]
ADAPTERS = [name for name in METHODS.names() if name != "full"]


def methods_with(fields: dict[str, Any]) -> list[str]:
    """Return the methods that have all of these options."""
    return [n for n in ADAPTERS if set(fields) <= set(METHODS.load(n).options.field_names())]


CASES = [(name, *case) for case in WRONG for name in methods_with(case[0])]


@pytest.mark.parametrize(("method", "fields", "sentence"), CASES, ids=str)
def test_what_matches_nothing_is_a_sentence_and_the_model_stays(
    tiny_llama, method, fields, sentence
):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    chosen = METHODS.load(method)
    with pytest.raises(ConfigError) as caught:
        chosen().prepare(model, chosen.options(**fields), iter(()))
    assert sentence in str(caught.value)
    assert len(caught.value.faults) == 1
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_in_python_too_and_before_a_sample_is_read(tiny_llama):
    def batches():
        raise AssertionError("calibrated")
        yield

    config = TLoraConfig(modules_to_save=["nosuch"], exclude_modules=["none"])
    with pytest.raises(ConfigError) as caught:
        get_tlora_model(tiny_llama(), config, batches())
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": "lm_head"},
        {"exclude_modules": ["lm_head"]},
        {"exclude_modules": "lm_head"},
        {"exclude_modules": ["embed_tokens"]},
        {"exclude_modules": ["model.layers.0.mlp.up_proj", "v_proj"]},
        {"exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": None, "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_names_that_the_model_has_choose_what_peft_chooses(tiny_llama, fields):
    config = TLoraConfig(**fields)
    given = {"target_modules": "all-linear"} | fields
    if isinstance(given.get("modules_to_save"), str):
        given["modules_to_save"] = [given["modules_to_save"]]
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, **given))
    wrapped = [n for n, m in adapted.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert [target.name for target in find_targets(tiny_llama(), config)] == wrapped


def test_one_word_trains_one_module(tiny_llama):
    batches = support.in_batches(support.causal_samples(), 5)
    adapted = get_tlora_model(tiny_llama(), TLoraConfig(r=2, modules_to_save="lm_head"), batches)
    full = {n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
    assert full == {"base_model.model.lm_head.modules_to_save.default.weight"}


def test_a_field_that_is_set_later_is_checked_too(tiny_llama):
    config = TLoraConfig()
    config.modules_to_save = "lm_head"
    with pytest.raises(ConfigError, match=r"`modules_to_save` is 'lm_head'; give a list of names"):
        find_targets(tiny_llama(), config)
