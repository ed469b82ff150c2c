"""Adapters on quantized bases: attached, trained, saved, loaded by PEFT alone, merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import quantized_bases
import support
from quantized_bases import FORMS, same_bits, stored
from support import logits_of, train
from tlora import TLoraConfig, attach, calibrate, get_tlora_model, load_adapter, plan
from tlora.calibration.preserve import keep_gradients
from tlora.calibration.targets import find_targets
from tlora.calibration.weights import dense_weight
from tlora.errors import AdapterError

CONFIG = TLoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(saved, tiny_llama) -> str:
    return saved(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2))


@pytest.fixture(params=list(FORMS))
def form(request: Any) -> str:
    return request.param


@pytest.fixture(params=["nf4", "nf4-plain"])
def four_bit(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def batch() -> support.Sample:
    return support.padded(support.causal_samples())


def planned(model: Any, batch: support.Sample) -> Any:
    return plan(model, calibrate(model, [batch], CONFIG), CONFIG)


def full_base(folder: str) -> Any:
    return quantized_bases.full(folder).eval()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_output_stays_that_of_the_quantized_base_to_the_bit(folder, form, batch, training):
    model = quantized_bases.load(folder, form)
    bits = stored(model)
    adapter = planned(model, batch)
    keep_gradients(model)
    before = logits_of(model.train(training), batch)

    adapted = attach(model, adapter).train(training)

    assert torch.equal(logits_of(adapted, batch), before)
    assert torch.equal(logits_of(quantized_bases.load(folder, form).train(), batch), before) or (
        form == "int8" and not training  # whose inputs are quantized too in eval mode
    )
    assert same_bits(bits, stored(adapted.unload()))
    assert {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} <= {torch.float32}


def lora(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def with_b(adapted: Any) -> Any:
    """Give every B numbers, as training would."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in lora(adapted).items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return adapted


def test_gradients_are_those_on_the_dequantized_weights(folder, form, batch):
    model = quantized_bases.load(folder, form)
    adapter = planned(model, batch)
    plain = full_base(folder)
    for target in find_targets(model, CONFIG):
        plain.get_submodule(target.name).weight.data = dense_weight(target)
    ours, theirs = (with_b(attach(each, adapter)).train() for each in (model, plain))
    # An evaluation in between, as trainers make them, changes nothing.
    logits_of(ours.eval(), batch)
    ours.train()

    for adapted in (ours, theirs):
        adapted(**batch).loss.backward()

    wanted = {name: value.grad for name, value in lora(theirs).items() if "lora_B" in name}
    for name, value in lora(ours).items():
        if "lora_B" in name:
            assert support.distance(value.grad, wanted[name]) < 1e-4


def test_it_is_merged_onto_the_full_precision_base(folder, form, batch, tmp_path):
    model = quantized_bases.load(folder, form)
    adapted = with_b(get_tlora_model(model, CONFIG, [batch], progress=False))
    adapted.save_pretrained(tmp_path)
    expected = logits_of(PeftModel.from_pretrained(full_base(folder), tmp_path), batch)

    merged = PeftModel.from_pretrained(full_base(folder), tmp_path).merge_and_unload()

    assert type(merged) is type(full_base(folder))
    assert {type(layer.weight) for layer in merged.modules() if isinstance(layer, nn.Linear)} == {
        nn.Parameter
    }
    assert support.distance(logits_of(merged, batch), expected) < 1e-5
    assert support.distance(logits_of(full_base(folder), batch), expected) > 0.1
    # And on the quantized base the adapter says what it says in full precision, nearly.
    assert support.distance(logits_of(adapted.train(), batch), expected) < 0.5


def test_training_goes_on_from_a_saved_adapter(folder, form, batch, tmp_path):
    first = get_tlora_model(quantized_bases.load(folder, form), CONFIG, [batch], progress=False)
    train(first.train(), batch, steps=3)
    first.save_pretrained(tmp_path)

    again = load_adapter(quantized_bases.load(folder, form), tmp_path, is_trainable=True).train()

    assert torch.equal(logits_of(again, batch), logits_of(first, batch))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n in lora(again) if "lora_B" in n
    }
    logits_of(again.eval(), batch)
    assert train(again.train(), batch, 1) == train(first, batch, 1)


def test_a_base_rewritten_for_inference_is_not_trained(folder, four_bit, batch, tmp_path):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = quantized_bases.load(folder, four_bit)
    adapter = planned(model, batch)
    attach(quantized_bases.load(folder, four_bit), adapter).save_pretrained(tmp_path)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)

    with pytest.raises(
        AdapterError, match=r"model\.layers\.1\.mlp\.up_proj: .*gradients no longer pass"
    ):
        attach(model, adapter)
    with pytest.raises(
        AdapterError, match=r"model\.layers\.1\.mlp\.up_proj: .*gradients no longer pass"
    ):
        load_adapter(model, tmp_path, is_trainable=True)
    assert not hasattr(model, "peft_config")
    assert find_targets(model, CONFIG)  # nothing is wrapped
    assert load_adapter(model, tmp_path).peft_config


def test_gpt2_projections_are_turned_the_right_way(saved, tiny_gpt2, batch):
    folder = saved(tiny_gpt2(n_embd=64, initializer_range=0.2))
    model = quantized_bases.load(folder, "nf4")
    keep_gradients(model)
    before = logits_of(model, batch)

    adapted = get_tlora_model(model, CONFIG, [batch], progress=False).eval()

    assert torch.equal(logits_of(adapted, batch), before)
    layer = adapted.base_model.model.transformer.h[0].mlp.c_fc
    assert (layer.lora_A["default"].in_features, layer.lora_B["default"].out_features) == (64, 256)
    losses = train(adapted, batch, steps=10)
    assert losses[-1] < 0.9 * losses[0]
