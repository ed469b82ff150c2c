"""Statistics of experts in fused parameters, against their definition by autograd in float64."""

from __future__ import annotations

import ast
import copy
import warnings

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn

import moe
import support
from tlora import TLoraConfig, calibrate, plan
from tlora.calibration import experts as layouts
from tlora.calibration.targets import find_targets, unadapted_experts
from tlora.calibration.weights import dense_weight
from tlora.errors import ConfigError

CONFIG = TLoraConfig(r=2, target_parameters=moe.BOTH)
LENGTHS = (7, 3, 10, 5, 2)  # the short ones reach some experts with no token


def assert_agrees(stats, expected, tolerance=1e-4):
    for name, want in expected.items():
        experts = [stats.modules[f"{name}[{e}]"] for e in range(moe.EXPERTS)]
        found = sum(expert.sensitivity for expert in experts) / moe.EXPERTS
        assert found == pytest.approx(want.sensitivity, rel=tolerance), name
        assert [expert.tokens for expert in experts] == want.tokens
        for expert, covariance in zip(experts, want.covariance, strict=True):
            assert support.distance(expert.covariance(), covariance) < tolerance, name


@pytest.fixture(scope="module", params=moe.MODELS)
def case(request):
    model = moe.MODELS[request.param]()
    samples = support.causal_samples(LENGTHS)
    return model, samples, moe.one_at_a_time(model, samples)


@pytest.mark.parametrize("side", ["alone", "left"])
def test_sensitivity_and_second_moments_equal_their_definition(case, side, monkeypatch):
    model, samples, expected = case
    # A padded batch is read as one, not cut into samples.
    monkeypatch.delattr("tlora.calibration.batches.single_samples")
    batches = samples if side == "alone" else support.in_batches(samples, 3, side)
    assert_agrees(calibrate(model, batches, CONFIG, progress=False), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_gives_the_same(implementation):
    model = moe.mixtral()
    samples = support.causal_samples(LENGTHS)
    expected = moe.one_at_a_time(model, samples)
    model.config._experts_implementation = implementation
    batches = support.in_batches(samples, 5)
    assert_agrees(calibrate(model, batches, CONFIG, progress=False), expected)


def test_experts_without_a_gate_and_with_a_norm_behind_them():
    model = moe.mixtral()
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            half = experts.gate_up_proj[:, : moe.SHAPE["intermediate_size"]].clone()
            del experts.gate_up_proj
            experts.up_proj = nn.Parameter(half)
            experts.has_gate, experts.has_post_expert_norm = False, True
            experts.post_expert_norm = nn.LayerNorm(moe.SHAPE["hidden_size"])
    config = TLoraConfig(r=2, target_parameters=["experts.up_proj", "down_proj"])
    samples = support.causal_samples(LENGTHS)
    stats = calibrate(model, support.in_batches(samples, 5), config, progress=False)

    double = copy.deepcopy(model).double().requires_grad_(False)
    double.config._experts_implementation = "batched_mm"
    names = moe.fused(model)
    totals = dict.fromkeys(names, 0.0)
    for name in names:
        double.get_parameter(name).requires_grad_(True)
    for sample in samples:
        double.zero_grad()
        double(**sample).loss.backward()
        for name in names:
            weight = double.get_parameter(name)
            totals[name] += (weight * weight.grad).abs().mean().item() / len(samples)
    for name in names:
        experts = [stats.modules[f"{name}[{e}]"].sensitivity for e in range(moe.EXPERTS)]
        assert sum(experts) / moe.EXPERTS == pytest.approx(totals[name], rel=1e-4)


def test_an_expert_without_tokens_takes_the_leading_directions_of_its_weight():
    model = moe.mixtral()
    route = model.model.layers[0].mlp.gate.forward

    def elsewhere(hidden):
        logits, weights, _ = route(hidden)
        rows = torch.arange(len(hidden))
        return logits, weights, torch.stack([rows % 3, (rows + 1) % 3], dim=1)

    model.model.layers[0].mlp.gate.forward = elsewhere
    config = TLoraConfig(r=3, allocate_rank=False, target_parameters=moe.BOTH)
    batches = support.in_batches(support.causal_samples(LENGTHS), 5)
    stats = calibrate(model, batches, config, progress=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    idle = stats.modules[f"{name}[3]"]
    assert (idle.tokens, idle.sensitivity) == (0, 0.0)
    assert idle.covariance().count_nonzero() == 0
    rows = plan(model, stats, config, progress=False).modules[name].lora_A[9:]
    leading = torch.linalg.svd(moe.as_matrix(model, name, 3)).Vh[:3]
    overlap = (rows @ leading.T).square().sum() / 3
    assert overlap.item() == pytest.approx(1.0, abs=1e-5)


def test_a_loss_that_balances_the_experts_is_taken_one_sample_at_a_time():
    model = moe.mixtral(output_router_logits=True, router_aux_loss_coef=0.5)
    samples = support.causal_samples(LENGTHS)
    batched = calibrate(model, support.in_batches(samples, 5), CONFIG, progress=False)
    assert_agrees(batched, moe.one_at_a_time(model, samples))


def test_the_weight_of_an_expert_is_read_as_m_x_d():
    for make in (moe.mixtral, moe.gpt_oss):
        model = make()
        targets = [t for t in find_targets(model, CONFIG) if t.part]
        assert len(targets) == 2 * 2 * moe.EXPERTS
        for target in targets:
            weight = dense_weight(target)
            assert weight.shape == (target.d_out, target.d_in)
            expected = moe.as_matrix(model, target.part.parameter, target.part.index)
            assert torch.equal(weight, expected)


def test_autocast_does_not_round_what_is_computed_again():
    experts = moe.mixtral().model.layers[0].mlp.experts
    rows = torch.randn(5, moe.SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0))
    plain = layouts.inward(experts, 1, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layouts.inward(experts, 1, rows), plain)


# --- which parameters


def test_nothing_fused_is_adapted_unless_named_and_one_warning_says_how():
    model = moe.mixtral()
    assert not any(target.part for target in find_targets(model, TLoraConfig()))
    with pytest.warns(UserWarning, match="fused parameters") as caught:
        calibrate(model, support.causal_samples((5,)), TLoraConfig(), progress=False)
    [message] = [str(w.message) for w in caught if "fused" in str(w.message)]
    assert "To adapt 4 of them" in message
    # What it says to write is what can be written.
    names = ast.literal_eval(message.partition("target_parameters=")[2].removesuffix("."))
    targets = find_targets(model, TLoraConfig(target_parameters=names))
    assert {t.part.parameter for t in targets if t.part} == set(moe.fused(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = TLoraConfig(target_parameters=names)
        calibrate(model, support.causal_samples((5,)), config, progress=False)


def test_parameters_alone_are_adapted_as_with_peft():
    model = moe.mixtral()
    config = TLoraConfig(target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"])
    adapters = {target.adapter for target in find_targets(model, config)}
    assert adapters == {"model.layers.1.mlp.experts.down_proj"}


def tiny_llama4():
    fields = moe.SHAPE | {"intermediate_size_mlp": 24, "num_local_experts": 4, "head_dim": 4}
    fields |= {"num_experts_per_tok": 1}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**fields))


def test_a_class_that_does_not_say_its_layout_is_named_with_the_reason():
    model = tiny_llama4()
    message = unadapted_experts(model, TLoraConfig())
    assert "Not possible for model.layers.0.feed_forward.experts.gate_up_proj" in message
    assert "Llama4TextExperts does not declare the layout of its experts" in message
    assert "target_parameters" not in message
    with pytest.raises(ConfigError, match="does not declare the layout of its experts"):
        find_targets(model, TLoraConfig(target_parameters=["experts.gate_up_proj"]))


def in_int8(experts):
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.int8), False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: setattr(e, "_is_expert_parallel", True), "spread over processes"),
        (in_int8, "stored as torch.int8"),
        (lambda e: cpu_offload(e, "cpu"), "offloaded: keep it on a device"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_do(change, reason):
    model = moe.mixtral()
    change(model.model.layers[1].mlp.experts)
    with pytest.raises(ConfigError, match=reason):
        find_targets(model, CONFIG)
    assert reason in unadapted_experts(model, TLoraConfig())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("experts.gate_up_prj", r"matches.*Did you mean 'experts.gate_up_proj'"),
        (
            "self_attn.q_proj.weight",
            "no fused parameter.*`target_modules` adapts Linears",
        ),
    ],
)
def test_a_name_that_matches_nothing_fused_is_met_with_those_that_would(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_targets(moe.mixtral(), TLoraConfig(target_parameters=[name]))
