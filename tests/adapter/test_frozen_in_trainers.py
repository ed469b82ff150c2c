"""A stays frozen in people's own trainers, by the adapter alone: no callback is given."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import quantized_bases
import tlora
from tlora import TLoraConfig, calibration_batches, get_tlora_model
from tlora.errors import AdapterError

ROWS = [{"prompt": f"{n}+{n}?", "completion": f" {n + n}"} for n in range(12)]
CONFIG = TLoraConfig(r=4, lora_alpha=4, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(saved, tiny_llama) -> str:
    return saved(tiny_llama(hidden_size=64, intermediate_size=128, initializer_range=0.2))


def adapted(folder: str, form: str, prepared: bool = False, dtype: str = "float32") -> Any:
    base = getattr(quantized_bases, form)(folder, dtype=dtype).eval()
    if prepared:
        base = peft.prepare_model_for_kbit_training(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return get_tlora_model(base, CONFIG, calibration_batches(tokenizer, ROWS, n=4))


def sft(model: Any, out: Any, **fields: Any) -> SFTTrainer:
    fields = {"max_steps": 3, "save_steps": 2, "learning_rate": 1e-2} | fields
    arguments = SFTConfig(str(out), bf16=False, use_cpu=True, report_to=[], **fields)
    return SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(ROWS))


def a_of(model: Any) -> Any:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}


def b_of(model: Any) -> list[Any]:
    return [p for n, p in model.named_parameters() if "lora_B" in n]


def assert_only_b_moved(model: Any, before: dict[str, Any]) -> None:
    for name, value in a_of(model).items():
        assert torch.equal(value, before[name].to(value.dtype)), name
        assert not model.get_parameter(name).requires_grad
    assert all(parameter.any() and parameter.requires_grad for parameter in b_of(model))
    assert len({p.dtype for n, p in model.named_parameters() if "lora_" in n}) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("prepared", [False, True])
def test_qlora_by_a_plain_sft_trainer(folder, tmp_path, form, dtype, prepared):
    model = adapted(folder, form, prepared, dtype)
    before = a_of(model)
    trainer = sft(model, tmp_path)
    assert torch.isfinite(torch.tensor(trainer.evaluate(trainer.train_dataset)["eval_loss"]))
    trainer.train()
    assert_only_b_moved(model, before)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("form", ["nf4", "int8", "full"])
def test_preparing_the_attached_model_is_named_before_a_step_is_lost(
    folder, tmp_path, form, checkpointing
):
    model = adapted(folder, form)
    before = a_of(model)
    model = peft.prepare_model_for_kbit_training(model, checkpointing)
    told = r"no parameter trains: .*call that on the base model before .* make a new trainer\.$"
    with pytest.raises(AdapterError, match=told):
        sft(model, tmp_path, gradient_checkpointing=checkpointing).train()
    assert not any(parameter.any() for parameter in b_of(model))

    model.set_adapter("default")
    sft(model, tmp_path, gradient_checkpointing=checkpointing).train()

    assert_only_b_moved(model, before)


def test_what_is_told_lets_a_head_train_again(tiny_llama):
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    config = dataclasses.replace(CONFIG, modules_to_save=["lm_head"])
    ids = torch.arange(5, 25).reshape(4, 5)
    model = get_tlora_model(base, config, [{"input_ids": ids, "labels": ids}])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    peft.prepare_model_for_kbit_training(model).set_adapter("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert any("lm_head" in name for name in trained)


def test_a_resumed_sft_trainer_keeps_a(folder, tmp_path):
    model, other = adapted(folder, "full"), adapted(folder, "full")
    before = a_of(model)
    sft(model, tmp_path).train()
    sft(other, tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert_only_b_moved(other, before)


def test_code_that_switches_parameters_by_their_names_trains_b_alone(folder, tmp_path):
    model = adapted(folder, "full")
    before = a_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    sft(model, tmp_path, weight_decay=0.1).train()
    assert_only_b_moved(model, before)


def test_one_call_freezes_what_peft_has_loaded(folder, tmp_path):
    first = adapted(folder, "full")
    first.save_pretrained(tmp_path / "init")
    base = quantized_bases.full(folder, dtype="float32").eval()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "init", is_trainable=True)
    before = a_of(model)
    tlora.freeze_a(model)
    sft(copy.deepcopy(model), tmp_path).train()
    sft(model, tmp_path).train()
    assert_only_b_moved(model, before)
    with pytest.raises(AdapterError, match="no LoRA layer with an adapter 'other'"):
        tlora.freeze_a(model, "other")


class FreezeA(transformers.TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tlora.freeze_a(kwargs["model"])


def test_a_callback_freezes_a_that_the_optimizer_holds_already(folder, tmp_path):
    adapted(folder, "full").save_pretrained(tmp_path / "init")
    base = quantized_bases.full(folder, dtype="float32").eval()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "init", is_trainable=True)
    before = a_of(model)
    trainer = sft(model, tmp_path, weight_decay=0.1)
    trainer.add_callback(FreezeA())
    trainer.train()
    assert_only_b_moved(model, before)


def test_an_adapter_that_is_not_to_train_computes_losses(folder, tmp_path):
    model = adapted(folder, "full")
    model.save_pretrained(tmp_path)
    base = quantized_bases.full(folder, dtype="float32").eval()
    loaded = tlora.load_adapter(base, tmp_path).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert loaded(input_ids=ids, labels=ids).loss.isfinite()
