"""Every method on a mixture of experts: it adapts the Linears that it says it does, or refuses."""

import dataclasses
import warnings

import pytest
import torch

import moe
from tlora.errors import ConfigError
from tlora.registry import METHODS

ADAPTERS = [name for name in METHODS.names() if METHODS.load(name).traits.leaves == "adapter"]
DENSE = ["gate_proj", "up_proj", "down_proj"]
BY_NAME = [name for name in ADAPTERS if name not in ("tlora", "adalora", "ailora", "lorta")]
"""PEFT's LoRA underneath, on modules that go by their names."""


def trained(prepared):
    return {n: p.numel() for n, p in prepared.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ADAPTERS)
def test_experts_are_left_alone_with_a_word(prepared_by, name, caplog):
    known = {field.name for field in dataclasses.fields(METHODS.load(name).options)}
    asked = {"exclude_modules": DENSE, "r": 2, "rho": 1, "group_size": 4}
    options = {key: value for key, value in asked.items() if key in known}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepared_by(name, moe.qwen3(), **options)
    counted = trained(prepared)
    assert counted
    assert all(".self_attn." in each for each in counted)
    if name in BY_NAME:
        said = [*caplog.messages, *(str(each.message) for each in caught)]
        assert any("experts in fused parameters" in each for each in said)


@pytest.mark.parametrize("name", ["lora", "pissa", "eva"])
def test_a_dense_layer_that_peft_takes_for_experts_is_refused_and_nothing_changed(
    prepared_by, name
):
    model = moe.qwen3()
    with pytest.raises(
        ConfigError, match=r"mlp\.gate_proj' and 2 more: .*down_proj, gate_proj, up"
    ):
        prepared_by(name, model)
    before, after = moe.qwen3().state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["lora", "pissa", "eva", "adalora"])
def test_a_module_that_cannot_be_adapted_leaves_no_other_wrapped(prepared_by, tiny_llama, name):
    model = tiny_llama()
    with pytest.raises(ConfigError, match="input_layernorm' is a LlamaRMSNorm"):
        prepared_by(name, model, target_modules=["q_proj", "input_layernorm"])
    assert model.state_dict().keys() == tiny_llama().state_dict().keys()
