"""Every registered method, by one matrix."""

import dataclasses

import pytest
import torch

from tlora import AdapterPlan
from tlora.errors import ConfigError
from tlora.registry import METHODS


@pytest.fixture
def batches():
    torch.manual_seed(1)
    ids = torch.randint(3, 160, (4, 12))
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(2)
    ]


def prepared_by(name, model, batches, plan=None, **options):
    method = METHODS.load(name)()
    torch.manual_seed(5)
    return method.prepare(model, method.options(task_type="CAUSAL_LM", **options), batches, plan)


@pytest.fixture(params=METHODS.names())
def name(request):
    return request.param


def test_the_options_are_a_record_with_a_task_type(name):
    options = METHODS.load(name).options
    assert dataclasses.is_dataclass(options)
    assert options(task_type="SEQ_CLS").task_type == "SEQ_CLS"


def test_an_unknown_option_gets_a_suggestion(name):
    with pytest.raises(
        ConfigError, match=r"there is no option `lora_alfa`\. Did you mean 'lora_alpha'"
    ):
        METHODS.load(name).options(lora_alfa=3)


def test_options_out_of_range_are_reported_together(name):
    with pytest.raises(ConfigError, match="2 faults") as caught:
        METHODS.load(name).options(r=0, lora_dropout=2)
    assert {fault.split("`")[1] for fault in caught.value.faults} == {"r", "lora_dropout"}


def test_the_output_is_the_base_models_before_training(name, tiny_llama, batches):
    before = tiny_llama()(**batches[0]).logits
    prepared = prepared_by(name, tiny_llama(), batches, r=4)
    assert torch.equal(prepared.model.eval()(**batches[0]).logits, before)


def test_only_the_adapter_trains_and_a_step_changes_the_output(name, tiny_llama, batches):
    prepared = prepared_by(name, tiny_llama(), batches, r=4)
    trainable = [key for key, p in prepared.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in key for key in trainable)
    before = prepared.model(**batches[0]).logits
    optimizer = torch.optim.SGD([p for p in prepared.model.parameters() if p.requires_grad], lr=1.0)
    prepared.model(**batches[0]).loss.backward()
    optimizer.step()
    assert not torch.equal(prepared.model(**batches[0]).logits, before)


def test_preparing_again_for_a_resumed_run_builds_the_same(name, tiny_llama, batches, tmp_path):
    first = prepared_by(name, tiny_llama(), batches, r=4)
    plan = None
    if first.plan is not None:
        first.plan.save(tmp_path / "plan.safetensors")
        plan = AdapterPlan.load(tmp_path / "plan.safetensors")
        batches = None  # nothing is calibrated
    again = prepared_by(name, tiny_llama(), batches, r=4, plan=plan)
    weights, expected = again.model.state_dict(), first.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert len(again.callbacks) == len(first.callbacks)


def test_task_aware_lora_freezes_a_and_guards_it(tiny_llama, batches):
    prepared = prepared_by("tlora", tiny_llama(), batches, r=4)
    trains = {key: p.requires_grad for key, p in prepared.model.named_parameters()}
    assert not any(flag for key, flag in trains.items() if "lora_A" in key)
    assert [type(callback).__name__ for callback in prepared.callbacks] == ["FrozenACallback"]
    loose = prepared_by("tlora", tiny_llama(), batches, r=4, freeze_a=False)
    assert loose.callbacks == []
    assert all(p.requires_grad for key, p in loose.model.named_parameters() if "lora_A" in key)


def test_lora_passes_peft_its_options(tiny_llama, batches):
    prepared = prepared_by(
        "lora", tiny_llama(), batches, r=3, lora_alpha=6, target_modules=["q_proj"], use_rslora=True
    )
    config = prepared.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 6, True)
    adapted = {key.split(".lora_")[0] for key in prepared.model.state_dict() if "lora_" in key}
    assert all(key.endswith("q_proj") for key in adapted)
    assert len(adapted) == 2


def test_lora_says_which_target_modules_peft_did_not_find(tiny_llama, batches):
    with pytest.raises(ConfigError, match="nowhere"):
        prepared_by("lora", tiny_llama(), batches, target_modules=["nowhere"])
