"""What a dry run says of quantized bases and of training under autocast, beside the measured."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers

import quantized_bases
import tlora
from tlora.tasks.dataconfig import DataConfig
from tlora.training import dryrun
from tlora.training.runconfig import RunConfig

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
TOKENS = (4, 64)
LOGITS = 2 * 4 * TOKENS[0] * TOKENS[1] * 64
"""What the loss makes when it is differentiated, which hooks do not see."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, dtype="bfloat16")
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    return str(path)


def predicted(folder, quantization="none", bf16=True):
    config = RunConfig(
        model=folder,
        data=DataConfig(max_length=TOKENS[1]),
        adapter={"r": 16, "lora_alpha": 16, "allocate_rank": False},
        quantization=quantization,
        trainer={"per_device_train_batch_size": TOKENS[0], "bf16": bf16, "use_cpu": True},
    )
    return dryrun.run(config)


def batch():
    ids = torch.randint(3, 60, TOKENS, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def weights_of(model):
    """Parameters and buffers, and what else quantized weights hold, by the place of their bytes."""
    tensors = [*model.parameters()]
    for parameter in [*model.parameters()]:
        if (state := getattr(parameter, "quant_state", None)) is not None:
            inner = state.state2
            tensors += [state.absmax, state.code, state.offset, inner.absmax, inner.code]
        if (scales := getattr(parameter, "SCB", None)) is not None:
            tensors.append(scales)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def kept_by(model, autocast):
    """Bytes that autograd keeps of a forward pass, without the model's own."""
    own = {*weights_of(model), *(b.untyped_storage().data_ptr() for b in model.buffers())}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = model(**batch()).loss
    kept = sum(storage.nbytes() for place, storage in storages.items() if place not in own)
    return kept, loss


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_quantized_weights_are_those_of_the_loaded_model(folder, form):
    dry = predicted(folder, form)
    loaded = quantized_bases.load(folder, form)
    assert dry.calibration.weights == pytest.approx(sum(weights_of(loaded).values()), rel=0.01)
    assert dry.calibration.weights < 0.65 * predicted(folder).calibration.weights


@pytest.mark.parametrize("way", ["tlora", "lora"])
def test_activations_under_autocast_are_within_a_tenth(folder, way):
    model = quantized_bases.full(folder, dtype=torch.bfloat16)
    if way == "tlora":
        config = tlora.TLoraConfig(r=16, lora_alpha=16, allocate_rank=False, task_type="CAUSAL_LM")
        adapted = tlora.get_tlora_model(model, config, [batch()], progress=False)
    else:
        stock = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, stock)
    found = next(each for each in predicted(folder).training if each.name == way)
    kept, _ = kept_by(adapted.train(), autocast=True)
    assert found.activations - LOGITS == pytest.approx(kept, rel=0.1)


def test_a_step_on_a_base_in_four_bits_is_within_a_tenth(folder):
    found = predicted(folder, "nf4").training[0]
    model = quantized_bases.load(folder, "nf4", dtype=torch.bfloat16)
    config = tlora.TLoraConfig(r=16, lora_alpha=16, allocate_rank=False, task_type="CAUSAL_LM")
    adapted = tlora.get_tlora_model(model, config, [batch()], progress=False).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in trained:  # as TRL does
        parameter.data = parameter.data.to(torch.bfloat16)
    adapted(**batch())  # A follows B
    kept, loss = kept_by(adapted, autocast=True)
    loss.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [v for each in optimizer.state.values() for n, v in each.items() if n != "step"]
    measured = sum(weights_of(adapted).values()) + kept
    measured += sum(t.nbytes for t in [*states, *(p.grad for p in trained)])
    assert found.peak() - LOGITS == pytest.approx(measured, rel=0.1)
    assert found.optimizer == sum(state.nbytes for state in states)
