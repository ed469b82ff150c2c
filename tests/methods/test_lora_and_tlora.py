"""What LoRA and task-aware LoRA do beside what every method promises (tests/contracts)."""

import pytest
import torch

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


def prepared_by(name, model, batches, **options):
    method = METHODS.load(name)()
    torch.manual_seed(5)
    return method.prepare(model, method.options(task_type="CAUSAL_LM", **options), batches)


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
        "lora", tiny_llama(), batches, r=3, lora_alpha=6, target_modules=["q_proj"]
    )
    config = prepared.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, 6)
    adapted = {key.split(".lora_")[0] for key in prepared.model.state_dict() if "lora_" in key}
    assert all(key.endswith("q_proj") for key in adapted)
    assert len(adapted) == 2


def test_lora_says_which_target_modules_peft_did_not_find(tiny_llama, batches):
    with pytest.raises(ConfigError, match="nowhere"):
        prepared_by("lora", tiny_llama(), batches, target_modules=["nowhere"])
