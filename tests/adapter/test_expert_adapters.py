"""Adapters on fused experts: planned as defined, attached by PEFT, trained, loaded, merged."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

import moe
import support
from tlora import (
    TLoraConfig,
    attach,
    calibrate,
    get_tlora_model,
    load_adapter,
    plan,
)
from tlora.adapter.blocks import plan_in_blocks
from tlora.adapter.freeze import fingerprint
from tlora.errors import AdapterError, ConfigError

R = 3
LENGTHS = (12, 9, 14, 8, 11)


def batches():
    return support.in_batches(support.causal_samples(LENGTHS), 3)


def config(**fields):
    return TLoraConfig(**{"r": R, "lora_alpha": R, "target_parameters": moe.BOTH} | fields)


def planned(model, **fields):
    wanted = config(**fields)
    return plan(model, calibrate(model, batches(), wanted, progress=False), wanted, progress=False)


def probe():
    return {"input_ids": support.ids(9, torch.Generator().manual_seed(7))}


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def made(request):
    """A factory of a model, and a plan for it."""
    make = moe.MODELS[request.param]
    return make, planned(make())


def test_each_expert_gets_the_leading_directions_of_its_w_c(made):
    make, adapter = made
    model = make()
    expected = moe.one_at_a_time(model, support.causal_samples(LENGTHS))
    for name in moe.fused(model):
        module = adapter.modules[name]
        assert module.experts == moe.EXPERTS
        kept, total = 0.0, 0.0
        for expert, rows in enumerate(module.lora_A.chunk(moe.EXPERTS)):
            assert rows.shape == (module.rank, module.d_in)
            torch.testing.assert_close(rows @ rows.T, torch.eye(module.rank), atol=1e-5, rtol=0)
            weight = moe.as_matrix(model, name, expert).double()
            product = weight @ expected[name].covariance[expert]
            values = torch.linalg.svdvals(product)
            captured = (product @ rows.double().T).square().sum()
            assert captured / values[: module.rank].square().sum() == pytest.approx(1, abs=1e-4)
            kept, total = kept + captured, total + values.square().sum()
        assert module.captured_energy == pytest.approx((kept / total).item(), abs=1e-4)
        assert module.sensitivity == pytest.approx(expected[name].sensitivity, rel=1e-4)


def test_the_output_does_not_change_to_the_bit(made):
    make, adapter = made
    model = make()
    before = support.logits_of(model, probe())
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        adapted = attach(model, adapter)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(support.logits_of(adapted, probe()), before)


def test_ranks_and_scales_arrive_in_peft(made):
    make, adapter = made
    adapted = attach(make(), adapter)
    seen = 0
    for name in moe.fused(make()):
        owner, _, attribute = name.rpartition(".")
        layer = adapted.base_model.model.get_submodule(owner)
        while layer.parameter_name != attribute:
            layer = layer.base_layer
        assert isinstance(layer, ParamWrapper)
        module = adapter.modules[name]
        assert layer.r["default"] == module.rank
        assert layer.scaling["default"] == pytest.approx(module.scale)
        assert torch.equal(layer.lora_A["default"].weight, module.lora_A)
        seen += 1
    assert seen == len([m for m in adapter.modules.values() if m.experts > 1])
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == adapter.trainable_parameters


def test_an_expert_s_update_is_that_of_its_own_rows(made):
    """W_e + s B_e A_e with A_e the rows of the plan, whatever layout PEFT gives lora_B."""
    make, adapter = made
    adapted = attach(make(), adapter)
    for name in moe.fused(make()):
        owner, _, attribute = name.rpartition(".")
        layer = adapted.base_model.model.get_submodule(owner)
        while layer.parameter_name != attribute:
            layer = layer.base_layer
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        delta = layer.get_delta_weight("default").detach()
        for expert, rows in enumerate(adapter.modules[name].lora_A.chunk(moe.EXPERTS)):
            own = delta[expert]
            own = own.T if own.shape[1] != rows.shape[1] else own
            outside = own - own @ torch.linalg.pinv(rows) @ rows
            assert outside.norm() < 1e-4 * own.norm()


def test_two_steps_move_b_alone_and_the_folder_holds_everything(made, tmp_path):
    make, adapter = made
    adapted = attach(make(), adapter).train()
    before = {n: fingerprint(p) for n, p in adapted.named_parameters()}
    support.train(adapted, batches()[0], steps=2)
    moved = {n for n, p in adapted.named_parameters() if fingerprint(p) != before[n]}
    assert moved == {n for n, _ in adapted.named_parameters() if "lora_B" in n}
    adapted.eval().save_pretrained(tmp_path)
    trained = support.logits_of(adapted, probe())
    assert not torch.equal(trained, support.logits_of(make(), probe()))

    by_peft = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(support.logits_of(by_peft, probe()), trained)
    ours = load_adapter(make(), tmp_path, is_trainable=True)
    assert torch.equal(support.logits_of(ours.eval(), probe()), trained)
    assert all(not a.requires_grad for n, a in ours.named_parameters() if "lora_A" in n)
    assert any(b.requires_grad for n, b in ours.named_parameters() if "lora_B" in n)
    merged = support.logits_of(by_peft.merge_and_unload(), probe())
    torch.testing.assert_close(merged, trained, atol=2e-5, rtol=0)


# --- plans


def test_the_budget_of_ranks_counts_a_parameter_once_and_that_of_parameters_its_experts():
    model = moe.mixtral()
    for name, adapter in ((b, planned(model, budget=b)) for b in ("rank", "params")):
        modules = adapter.modules.values()
        uniform = sum(R * m.experts * m.d_out for m in modules)
        if name == "rank":
            assert sum(m.rank for m in modules) == R * len(modules)
        else:
            assert adapter.trainable_parameters <= uniform
            # What is left is less than the cheapest rank that could be added.
            left = uniform - adapter.trainable_parameters
            assert left < max(m.experts * m.d_out for m in modules)


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_budget": 3000},
        {"memory_budget": 5000, "budget": "params"},
    ],
    ids=str,
)
def test_within_a_budget_the_plan_is_the_same_to_the_bit(fields):
    model = moe.gpt_oss()
    whole = planned(model, **fields | {"memory_budget": None})
    blocks = plan_in_blocks(model, batches(), config(**fields), progress=False)
    assert blocks.info["passes"] > 2
    assert list(blocks.modules) == list(whole.modules)
    for name, module in whole.modules.items():
        assert blocks.modules[name].rank == module.rank
        assert blocks.modules[name].captured_energy == module.captured_energy
        assert torch.equal(blocks.modules[name].lora_A, module.lora_A), name


def test_experts_are_streamed_where_one_moment_exceeds_the_budget():
    model = moe.mixtral()
    fields = {"covariance": "streamed", "allocate_rank": False}
    whole = planned(model, allocate_rank=False)
    streamed = plan_in_blocks(model, batches(), config(**fields), progress=False)
    for name in moe.fused(model):
        found, exact = streamed.modules[name], whole.modules[name]
        assert found.solver == "streamed"
        pairs = zip(found.lora_A.chunk(moe.EXPERTS), exact.lora_A.chunk(moe.EXPERTS), strict=True)
        for ours, theirs in pairs:
            overlap = (ours @ theirs.T).square().sum() / len(ours)
            assert overlap > 0.99


def test_a_rank_of_zero_leaves_the_parameter_out():
    model = moe.mixtral()
    adapter = planned(model)
    name = moe.fused(model)[0]
    left = dataclasses.replace(adapter.modules[name], rank=0, lora_A=torch.zeros(0, 16))
    adapter.modules[name] = left
    adapted = attach(model, adapter)
    assert name not in adapted.peft_config["default"].target_parameters
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == adapter.trainable_parameters


def test_a_plan_of_another_number_of_experts_is_refused_and_the_model_stays():
    adapter = planned(moe.mixtral())
    model = moe.mixtral(num_local_experts=3)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError, match="of 4 experts"):
        attach(model, adapter)
    assert [name for name, _ in model.named_modules()] == before


# --- dense layers whose names PEFT takes for those of experts


def tiny_deepseek():
    fields = moe.SHAPE | {"moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 1}
    fields |= {"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    fields |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    model_config = transformers.DeepseekV3Config(**fields | {"v_head_dim": 4, "head_dim": 4})
    return support.seeded(lambda: transformers.DeepseekV3ForCausalLM(model_config))


@pytest.mark.parametrize("make", [moe.qwen3, tiny_deepseek])
@pytest.mark.parametrize("parameters", [None, moe.BOTH])
def test_dense_layers_beside_experts_are_adapted_too(make, parameters, tmp_path):
    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fused parameters")
        adapted = get_tlora_model(
            model, config(target_parameters=parameters), batches(), progress=False
        )
    name = "model.layers.0.mlp.gate_proj"
    assert f"{name}.weight" in adapted.peft_config["default"].target_parameters
    assert torch.equal(support.logits_of(adapted, probe()), support.logits_of(make(), probe()))
    support.train(adapted.train(), batches()[0], steps=2)
    layer = adapted.base_model.model.get_submodule(name)
    assert layer.lora_B["default"].weight.any()
    adapted.eval().save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(support.logits_of(by_peft, probe()), support.logits_of(adapted, probe()))
    merged = by_peft.merge_and_unload()
    torch.testing.assert_close(
        support.logits_of(merged, probe()), support.logits_of(adapted, probe()), atol=2e-5, rtol=0
    )


def test_what_forbids_that_is_said_before_anything_runs():
    with pytest.raises(ConfigError, match=r"down_proj' and 2 more.*lora_dropout.*exclude"):
        get_tlora_model(moe.qwen3(), TLoraConfig(r=2, lora_dropout=0.1), batches(), progress=False)
    names = ["gate_proj", "up_proj", "down_proj"]
    fields = {"lora_dropout": 0.1, "exclude_modules": names}
    with pytest.warns(UserWarning, match="fused"):
        get_tlora_model(moe.qwen3(), TLoraConfig(r=2, **fields), batches(), progress=False)
