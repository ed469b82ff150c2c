"""Which modules are targets, against what PEFT itself wraps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import support
from families import FAMILIES
from tlora import TLoraConfig, calibrate, get_tlora_model
from tlora.calibration.probe import checked_targets
from tlora.calibration.targets import find_targets, fused_parameters
from tlora.errors import AdapterError, ConfigError

FIELDS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": None},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.(k_proj|down_proj)"},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": "all-linear", "modules_to_save": ["gate_proj"]},
]


def wrapped_by_peft(model: nn.Module, **fields: Any) -> list[str]:
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **fields))
    modules = adapted.base_model.model.named_modules()
    return [name for name, module in modules if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_targets_are_what_peft_wraps(tiny_llama, fields):
    model = tiny_llama()
    names = [target.name for target in find_targets(model, TLoraConfig(**fields))]
    assert names == wrapped_by_peft(model, **fields)


@pytest.mark.parametrize(
    ("family", "task_type"),
    [
        ("gpt2-right", None),
        ("bert", None),
        ("bert", "SEQ_CLS"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("vit", None),
    ],
)
def test_all_linear_is_what_peft_wraps(family_of, family, task_type):
    model = family_of(family).model
    targets = find_targets(model, TLoraConfig(task_type=task_type))

    assert [t.name for t in targets] == wrapped_by_peft(
        model, target_modules="all-linear", task_type=task_type
    )
    if task_type == "SEQ_CLS":
        assert "classifier" not in {t.name for t in targets}


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_peft_trains_in_full_are_no_targets(task_type):
    import transformers

    kind = {
        "TOKEN_CLS": transformers.BertForTokenClassification,
        "QUESTION_ANS": transformers.BertForQuestionAnswering,
    }[task_type]
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    model = kind(transformers.BertConfig(vocab_size=160, num_hidden_layers=1, **shape))
    fields = {"target_modules": "all-linear", "task_type": task_type}

    names = [target.name for target in find_targets(model, TLoraConfig(**fields))]

    # PEFT itself would wrap the head twice, and stop.
    heads = ["classifier", "qa_outputs"]
    assert names == wrapped_by_peft(model, **fields, exclude_modules=heads)
    assert not set(heads) & set(names)


def test_what_peft_takes_for_a_head_by_the_end_of_its_name_is_no_target():
    model = FAMILIES["distilbert"].build()
    names = [t.name for t in find_targets(model, TLoraConfig(task_type="SEQ_CLS"))]
    assert not any("classifier" in name for name in names)
    # PEFT itself wraps both pre_classifier and classifier, to train them in full.
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, task_type="SEQ_CLS"))
    full = {n for n, m in adapted.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"}
    assert full == {"base_model.model.pre_classifier", "base_model.model.classifier"}


def test_what_peft_refuses_in_an_architecture_is_refused_before_anything_is_measured():
    model = FAMILIES["mamba"].build()
    names = {t.name.rpartition(".")[2] for t in find_targets(model, TLoraConfig())}
    assert names == {"in_proj", "x_proj", "dt_proj"}
    with pytest.raises(ConfigError, match=r"'out_proj' is incompatible with Mamba"):
        find_targets(model, TLoraConfig(target_modules=["x_proj", "out_proj"]))


def test_a_target_knows_the_shape_of_its_weight(tiny_gpt2, tiny_llama):
    shapes = {t.name: (t.d_out, t.d_in) for t in find_targets(tiny_gpt2(), TLoraConfig())}
    assert shapes["transformer.h.0.attn.c_attn"] == (48, 16)
    assert shapes["transformer.h.1.mlp.c_proj"] == (16, 64)
    shapes = {t.name: (t.d_out, t.d_in) for t in find_targets(tiny_llama(), TLoraConfig())}
    assert shapes["model.layers.0.self_attn.k_proj"] == (8, 16)
    assert shapes["model.layers.0.mlp.down_proj"] == (16, 32)


def test_nothing_matches_lists_the_names_and_suggests_one(tiny_llama):
    with pytest.raises(ConfigError) as caught:
        find_targets(tiny_llama(), TLoraConfig(target_modules=["q_porj"]))
    message = str(caught.value)
    assert "LlamaForCausalLM" in message
    assert "'q_porj'" in message
    assert "Did you mean 'q_proj'?" in message
    for name in ("down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "up_proj", "v_proj"):
        assert name in message


def test_everything_excluded_says_what_was_excluded(tiny_llama):
    with pytest.raises(ConfigError, match=r"without \['q_proj'\]"):
        find_targets(
            tiny_llama(), TLoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])
        )


def test_modules_of_another_kind_are_all_named(tiny_llama):
    with pytest.raises(ConfigError) as caught:
        find_targets(tiny_llama(), TLoraConfig(target_modules=["embed_tokens", "mlp", "q_proj"]))
    assert len(caught.value.faults) == 3
    assert "'model.embed_tokens' is a Embedding" in str(caught.value)
    assert "'model.layers.1.mlp' is a LlamaMLP" in str(caught.value)


def test_an_unknown_architecture_has_no_default():
    with pytest.raises(ConfigError, match=r"no default for the architecture None.*all-linear"):
        find_targets(support.Toy(), TLoraConfig(target_modules=None))


def test_a_model_with_adapters_is_refused(tiny_llama):
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(AdapterError, match=r"already has adapters.*unload"):
            find_targets(model, TLoraConfig())


def test_fused_experts_are_named():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ParameterDict({"gate_up": nn.Parameter(torch.zeros(4, 8, 8))})
            self.conv = nn.Conv1d(2, 2, 3)
            self.linear = Conv1D(8, 8)

    assert [name for name, _, _ in fused_parameters(Fused())] == ["experts.gate_up"]


def test_a_head_tied_to_the_embedding_is_adapted_alone_and_peft_warns(tiny_gpt2, tmp_path):
    model, [batch] = tiny_gpt2(), support.in_batches(support.causal_samples(), 5)
    fresh, before = copy.deepcopy(model), support.logits_of(model, batch)
    assert model.lm_head.weight is model.transformer.wte.weight
    fields = TLoraConfig(r=2, target_modules=["lm_head", "c_attn"], task_type="CAUSAL_LM")

    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapted = get_tlora_model(model, fields, [batch])

    assert torch.equal(support.logits_of(adapted, batch), before)
    base = adapted.base_model.model
    assert base.lm_head.base_layer.weight is base.transformer.wte.weight
    assert type(base.transformer.wte) is nn.Embedding
    weight = base.transformer.wte.weight.clone()
    losses = support.train(adapted, batch, steps=3)
    assert losses[-1] < losses[0]
    assert torch.equal(base.transformer.wte.weight, weight)
    adapted.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(support.logits_of(again, batch), support.logits_of(adapted, batch))


def test_what_is_no_configuration_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match=r"is a list; give a TLoraConfig"):
        find_targets(tiny_llama(), [{"input_ids": None}])
    with pytest.raises(ConfigError, match=r"is a list; give a TLoraConfig"):
        get_tlora_model(tiny_llama(), [{"input_ids": None}], TLoraConfig())
    with pytest.raises(ConfigError, match=r"is a list; give a TLoraConfig"):
        calibrate(tiny_llama(), TLoraConfig(), [{"input_ids": None}])


def test_a_module_under_two_names_is_a_target_once_and_said_to_be(tiny_llama):
    model = tiny_llama()
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.up_proj is also model\.layers\.1\.mlp"):
        names = [t.name for t in checked_targets(model, TLoraConfig())]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names
