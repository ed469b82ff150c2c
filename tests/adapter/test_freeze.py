"""A stays frozen, whatever PEFT's switches, a second adapter and the trainers do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainerCallback, TrainingArguments

import support
from tlora import attach, load_adapter
from tlora.adapter.freeze import FrozenACallback, fingerprint, lora_layers, match_dtypes
from tlora.errors import AdapterError


@pytest.fixture
def base(calibrated) -> Any:
    return calibrated("llama-right")


def needing(model: torch.nn.Module, part: str) -> list[bool]:
    return [p.requires_grad for name, p in model.named_parameters() if part in name]


def assert_frozen(adapted: PeftModel, active: bool = True) -> None:
    assert len(needing(adapted, "lora_A.default")) == 14
    assert not any(needing(adapted, "lora_A.default"))
    assert all(needing(adapted, "lora_B.default")) == active


def test_a_stays_frozen_through_disable_adapter(base):
    adapted = attach(base.model, base.plan())
    with adapted.disable_adapter():
        assert not any(needing(adapted, "lora_"))
    assert_frozen(adapted)


@pytest.mark.parametrize("twice", [False, True])
def test_a_stays_frozen_through_set_adapter(base, twice):
    adapted = attach(base.model, base.plan())
    for _ in range(1 + twice):
        adapted.set_adapter("default")
    assert_frozen(adapted)
    adapted.base_model.disable_adapter_layers()
    adapted.base_model.enable_adapter_layers()
    assert_frozen(adapted)


def test_a_stays_frozen_beside_a_second_adapter(base):
    adapted = attach(base.model, base.plan())
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    assert_frozen(adapted)
    adapted.set_adapter("other")
    assert_frozen(adapted, active=False)
    # A stock adapter beside ours trains both of its matrices.
    assert all(needing(adapted, "lora_A.other") + needing(adapted, "lora_B.other"))
    adapted.set_adapter("default")
    assert_frozen(adapted)
    adapted.base_model.set_adapter(["default", "other"])
    assert_frozen(adapted)
    adapted.delete_adapter("other")
    assert_frozen(adapted)


def test_a_stays_frozen_after_loading(base, tmp_path):
    fresh = copy.deepcopy(base.model)
    adapted = attach(base.model, base.plan())
    support.train(adapted.train(), base.batch, steps=2)
    adapted.save_pretrained(tmp_path)

    loaded = load_adapter(fresh, tmp_path, is_trainable=True)

    assert_frozen(loaded)
    with loaded.disable_adapter():
        pass
    loaded.set_adapter("default")
    assert_frozen(loaded)
    assert torch.equal(
        support.logits_of(loaded.eval(), base.batch), support.logits_of(adapted.eval(), base.batch)
    )
    before = {n: p.clone() for n, p in loaded.named_parameters()}
    support.train(loaded.train(), base.batch, steps=2)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_B" not in name), name


def test_an_unfrozen_adapter_is_loaded_to_train_both(base, tmp_path):
    fresh = copy.deepcopy(base.model)
    attach(base.model, base.plan(freeze_a=False)).save_pretrained(tmp_path)
    loaded = load_adapter(fresh, tmp_path, is_trainable=True, freeze=False, adapter_name="more")
    assert all(needing(loaded, "lora_A.more") + needing(loaded, "lora_B.more"))


def test_pefts_own_loading_into_an_attached_model_keeps_a_frozen(base, tmp_path):
    adapted = attach(base.model, base.plan())
    adapted.save_pretrained(tmp_path)
    adapted.load_adapter(tmp_path, "default", is_trainable=True)
    assert_frozen(adapted)


# --- the Trainer


def trainer(model: Any, samples: list, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    rows = [{key: value[0] for key, value in sample.items()} for sample in samples]
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda rows: support.padded(
            [{key: value[None] for key, value in row.items()} for row in rows]
        ),
        callbacks=[FrozenACallback()],
    )


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_a_resumed_trainer_continues_exactly(base, tmp_path):
    planned = base.plan()
    other = copy.deepcopy(base.model)
    whole = attach(base.model, planned)
    start = adapter_of(whole)
    trainer(whole, base.family.samples, tmp_path, steps=4).train()
    end = adapter_of(whole)
    for name, value in end.items():
        assert torch.equal(value, start[name]) == ("lora_A" in name), name

    resumed = attach(other, planned)
    again = trainer(resumed, base.family.samples, tmp_path, steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert again.state.global_step == 4
    assert_frozen(resumed)
    for name, value in adapter_of(resumed).items():
        assert torch.equal(value, end[name]), name


def test_the_callback_stops_a_trainer_whose_a_would_train(base, tmp_path):
    adapted = attach(base.model, base.plan(freeze_a=False))
    with pytest.raises(AdapterError, match=r"q_proj: A requires a gradient.*load_adapter"):
        trainer(adapted, base.family.samples, tmp_path, steps=1).train()


class Meddling(TrainerCallback):
    """Writes into one A after a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            layer = kwargs["model"].base_model.model.model.layers[1].mlp.up_proj
            layer.lora_A["default"].weight.data[0, 0] += 1e-3


@pytest.mark.parametrize("step", [1, 3])
def test_the_callback_stops_a_trainer_whose_a_was_moved(base, tmp_path, step):
    run = trainer(attach(base.model, base.plan()), base.family.samples, tmp_path, steps=3)
    run.add_callback(Meddling(step))
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj: A changed during training"):
        run.train()
    # Found at the first checkpoint, which comes every two steps, or at the end.
    assert run.state.global_step == max(step, 2)


# --- parts


def test_the_layers_of_an_adapter(base):
    planned = base.plan(target_modules=["q_proj"])
    adapted = attach(base.model, planned, adapter_name="task")
    found = dict(lora_layers(adapted, "task"))
    assert [name.removeprefix("base_model.model.") for name in found] == list(planned.modules)
    assert all(isinstance(layer, LoraLayer) for layer in found.values())
    assert list(lora_layers(adapted, "default")) == []


@pytest.mark.parametrize("explicitly", [False, True])
def test_a_frozen_a_follows_the_dtype_of_its_b(base, explicitly):
    adapted = attach(base.model, base.plan()).to(torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data.float()
    if explicitly:
        match_dtypes(adapted)
    assert support.logits_of(adapted, base.batch).isfinite().all()
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert_frozen(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_a_fingerprint_changes_with_any_bit_and_any_place(dtype):
    value = (torch.arange(35).view(5, 7) * 1.5 - 20).to(dtype)
    mark = fingerprint(value)
    assert fingerprint(value.clone()) == mark
    assert fingerprint(value.T.contiguous().T) == mark
    swapped = value.flatten().clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fingerprint(swapped.view(5, 7)) != mark
    for row in range(5):
        other = value.clone()
        other[row, 3] = other[row, 3] + 1
        assert fingerprint(other) != mark
    if dtype.is_floating_point:
        assert fingerprint(torch.zeros(2, dtype=dtype)) != fingerprint(-torch.zeros(2, dtype=dtype))


def test_a_fingerprint_is_that_of_the_part_however_much_of_the_tensor_is_here():
    weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
    # As ZeRO-3 keeps a parameter: its part stays while the whole comes and goes.
    weight.ds_id, weight.ds_tensor = 0, weight.detach()[:2].flatten().clone()
    part = fingerprint(weight)
    weight.data = torch.empty(0)
    assert fingerprint(weight) == part
    weight.ds_tensor[0] += 1
    assert fingerprint(weight) != part
