"""Adapters on an offloaded base: attached, trained, saved, and loaded onto it or a whole one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import support
from offloaded_bases import WAYS, is_offloaded, on_disk
from support import logits_of, train
from tlora import AdapterPlan, TLoraConfig, attach, get_tlora_model, load_adapter
from tlora.adapter.blocks import plan_in_blocks
from tlora.errors import AdapterError

CONFIG = TLoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM")


@pytest.fixture(params=list(WAYS))
def way(request: Any) -> Any:
    return WAYS[request.param]


@pytest.fixture
def batch() -> support.Sample:
    return support.padded(support.causal_samples())


def lora(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def test_it_is_the_adapter_of_the_loaded_base(tiny_llama, way, batch, tmp_path):
    whole = tiny_llama().to(torch.bfloat16)
    model = way(copy.deepcopy(whole), tmp_path)
    expected = get_tlora_model(whole, CONFIG, [batch])
    before = logits_of(model, batch)

    adapted = get_tlora_model(model, CONFIG, [batch])

    assert torch.equal(logits_of(adapted, batch), before)
    assert is_offloaded(adapted)
    wanted = lora(expected)
    assert list(lora(adapted)) == list(wanted)
    for name, value in lora(adapted).items():
        assert torch.equal(value, wanted[name])
        assert value.dtype == wanted[name].dtype
        assert value.requires_grad == wanted[name].requires_grad == ("lora_B" in name)


def test_it_trains_as_on_the_loaded_base_and_goes_on_after_a_load(tiny_llama, way, batch, tmp_path):
    whole = tiny_llama()
    model = way(copy.deepcopy(whole), tmp_path)
    adapted = get_tlora_model(model, CONFIG, [batch]).train()
    reference = get_tlora_model(copy.deepcopy(whole), CONFIG, [batch]).train()

    losses = train(adapted, batch, steps=4)

    assert losses == pytest.approx(train(reference, batch, steps=4), rel=1e-6)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path / "adapter")
    assert support.distance(logits_of(by_peft, batch), logits_of(adapted.eval(), batch)) < 1e-6
    again = load_adapter(
        way(copy.deepcopy(whole), tmp_path / "again"), tmp_path / "adapter", is_trainable=True
    )
    assert is_offloaded(again)
    assert support.distance(logits_of(again, batch), logits_of(adapted, batch)) < 1e-6
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n in lora(again) if "lora_B" in n
    }
    assert train(again, batch, 1) == pytest.approx(train(adapted, batch, 1), rel=1e-6)


def test_a_plan_made_offloaded_is_attached_to_a_model_that_is_loaded(tiny_llama, batch, tmp_path):
    whole = tiny_llama()
    planned = plan_in_blocks(on_disk(copy.deepcopy(whole), tmp_path), [batch], CONFIG)
    loaded = AdapterPlan.load(planned.save(tmp_path))
    before = logits_of(whole, batch)
    adapted = attach(whole, loaded)
    assert torch.equal(logits_of(adapted, batch), before)
    for name, module in planned.modules.items():
        layer = adapted.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, module.lora_A)


def test_heads_and_biases_that_would_train_but_are_dropped_are_refused(
    tiny_bert_classifier, tmp_path
):
    batches = support.in_batches(support.classified_samples(), 5)
    model = on_disk(tiny_bert_classifier(), tmp_path)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    for fields, message in (
        ({"task_type": "SEQ_CLS"}, r"classifier\.bias and 1 more would train in full but"),
        ({"modules_to_save": ["pooler"]}, r"bert\.pooler\.dense\.bias and 1 more would train"),
        ({"bias": "all"}, r"and \d+ more would train in full but is offloaded"),
        (
            {"bias": "lora_only", "target_modules": ["query"]},
            r"query\.bias and 1 more would train in full",
        ),
    ):
        with pytest.raises(AdapterError, match=message):
            get_tlora_model(model, TLoraConfig(r=2, **fields), batches)
        assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert get_tlora_model(model, TLoraConfig(r=2), batches)
