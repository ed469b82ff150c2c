"""Methods that start from a part of W: what they take out, and what they put back when saving."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from tlora.adapter.freeze import lora_layers
from tlora.errors import AdapterError, CalibrationError, ConfigError
from tlora.methods.base import Samples
from tlora.registry import METHODS

RESIDUAL = [
    name
    for name in METHODS.names()
    if METHODS.load(name).traits.changes_base and METHODS.load(name).traits.leaves == "adapter"
]


def layers(prepared):
    """Yield name, residual weight (m x d), A, B and s of each adapted module."""
    for name, layer in lora_layers(prepared.model.base_model.model):
        base = layer.get_base_layer()
        weight = base.weight if isinstance(base, torch.nn.Linear) else base.weight.T
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        yield name, weight.detach(), a.detach(), b.detach(), layer.scaling["default"]


def dense(model, name):
    module = model.get_submodule(name)
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
    return weight.detach()


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_and_adapter_add_up_to_every_weight(prepared_by, tiny_llama, name):
    model = tiny_llama(initializer_range=0.2)
    prepared = prepared_by(name, tiny_llama(initializer_range=0.2), r=2, lora_alpha=7.0)
    found = list(layers(prepared))
    assert len(found) == (4 if name == "ailora" else 14)
    for module, residual, a, b, scale in found:
        weight = dense(model, module)
        torch.testing.assert_close(residual + scale * b @ a, weight, rtol=1e-5, atol=1e-6)
        assert (scale * b @ a).norm() > 1e-3 * weight.norm()


@pytest.mark.parametrize("name", ["pissa", "corda", "lora-ga"])
def test_transposed_weights_are_taken_apart_too(prepared_by, tiny_gpt2, name):
    model = tiny_gpt2(initializer_range=0.2)
    prepared = prepared_by(name, tiny_gpt2(initializer_range=0.2), r=2, lora_alpha=3)
    for module, residual, a, b, scale in layers(prepared):
        torch.testing.assert_close(
            residual + scale * b @ a, dense(model, module), rtol=1e-5, atol=1e-6
        )


def singular_part(weight, part):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, part] * s[part]) @ vh[part]).float()


def test_ailora_takes_queries_from_the_top_and_values_from_the_bottom(prepared_by, tiny_llama):
    model = tiny_llama()
    prepared = prepared_by("ailora", tiny_llama(), r=3, lora_alpha=3)
    names = []
    for module, _, a, b, _ in layers(prepared):
        part = slice(3) if module.endswith("q_proj") else slice(-3, None)
        expected = singular_part(dense(model, module), part)
        torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b.T @ b, a @ a.T, rtol=1e-4, atol=1e-6)
        names.append(module.rsplit(".", 1)[-1])
    assert names == ["q_proj", "v_proj"] * 2


def test_ailora_says_what_it_does_not_find(prepared_by, tiny_gpt2):
    with pytest.raises(ConfigError, match="2 faults") as caught:
        prepared_by("ailora", tiny_gpt2(), r=2)
    assert "`query_modules`" in caught.value.faults[0]
    assert "`value_modules`" in caught.value.faults[1]


def test_milora_takes_the_minor_components_at_any_scale(prepared_by, tiny_llama):
    model = tiny_llama()
    for module, _, a, b, scale in layers(prepared_by("milora", tiny_llama(), r=2, lora_alpha=6)):
        expected = singular_part(dense(model, module), slice(-2, None))
        torch.testing.assert_close(scale * b @ a, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "how"), [("pissa", "pissa"), ("olora", "olora")])
def test_a_start_without_data_is_pefts_own(prepared_by, tiny_llama, name, how):
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules="all-linear", init_lora_weights=how, task_type="CAUSAL_LM"
    )
    expected = peft.get_peft_model(tiny_llama(), config).state_dict()
    state = prepared_by(name, tiny_llama(), r=2, lora_alpha=5).model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_corda_is_pefts_own_where_pefts_statistics_are_right(prepared_by, tiny_llama, batches):
    # One sample, alone in its batch: then a scale of the inputs falls out of the decomposition.
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    from tlora.calibration.batches import single_samples

    model = tiny_llama()
    [sample, *_] = single_samples(batches[0], model)
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=names,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )
    preprocess_corda(model, config, run_model=lambda: model(**sample))
    expected = peft.get_peft_model(model, config)
    prepared = prepared_by(
        "corda", tiny_llama(), data=[sample], r=2, lora_alpha=3, target_modules=names
    )
    for name, layer in lora_layers(expected.base_model.model):
        ours = prepared.model.base_model.model.get_submodule(name)
        torch.testing.assert_close(
            ours.get_base_layer().weight, layer.get_base_layer().weight, rtol=1e-3, atol=1e-4
        )


def test_lora_ga_goes_by_the_mean_gradient_without_dropout(prepared_by, tiny_llama, batches):
    model = tiny_llama(attention_dropout=0.5).train()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    from tlora.adapter.gradients import gradients_by_peft
    from tlora.adapter.stock import exact, targets_of
    from tlora.methods.loraga import LoraGaOptions

    targets = targets_of(model, LoraGaOptions(task_type="CAUSAL_LM"))
    ga = peft.LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **exact(model, targets)
    )
    found = gradients_by_peft(model, targets, ga, batches)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    model.eval().requires_grad_(True)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    for target in targets:
        torch.testing.assert_close(
            found[target.name], target.module.weight.grad, rtol=1e-4, atol=1e-7
        )


def test_lora_ga_spans_the_leading_singular_vectors_of_the_gradient(
    prepared_by, tiny_llama, batches
):
    model = tiny_llama(initializer_range=0.2).requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
    prepared = prepared_by("lora-ga", tiny_llama(initializer_range=0.2), r=2)
    for module, _, a, b, _ in layers(prepared):
        u, s, vh = torch.linalg.svd(model.get_submodule(module).weight.grad / len(batches))
        torch.testing.assert_close(a.abs(), vh[:2].abs(), rtol=1e-2, atol=1e-3)
        wanted = (u[:, 2:4] * s[2:4]).abs() * len(b) ** 0.25 / 4
        torch.testing.assert_close(b.abs(), wanted, rtol=1e-2, atol=1e-3)


def test_the_papers_lora_ga_starts_from_both_sides_without_singular_values(prepared_by, tiny_llama):
    pefts = prepared_by("lora-ga", tiny_llama(initializer_range=0.2), r=2)
    papers = prepared_by(
        "lora-ga", tiny_llama(initializer_range=0.2), r=2, init_scale="paper", stable_gamma=9
    )
    for (_, _, a, b, _), (_, _, first, second, _) in zip(
        layers(pefts), layers(papers), strict=True
    ):
        factor = len(b) ** 0.25 / 3
        torch.testing.assert_close(first.abs(), factor * a.abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            second.abs(), factor * (b / b.norm(dim=0)).abs(), rtol=1e-3, atol=1e-4
        )


def test_what_is_saved_is_what_pefts_own_conversion_saves(prepared_by, tiny_llama, tmp_path):
    prepared = prepared_by("pissa", tiny_llama(), r=2, lora_alpha=3)
    prepared.model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in prepared.model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    prepared.save(tmp_path / "ours")
    prepared.model.save_pretrained(
        tmp_path / "pefts", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    ours, pefts = (
        load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "pefts")
    )
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[key], pefts[key]) for key in pefts)
    configs = [
        json.loads((tmp_path / which / "adapter_config.json").read_text())
        for which in ("ours", "pefts")
    ]
    assert [(c["r"], c["lora_alpha"], c["init_lora_weights"]) for c in configs] == [
        (4, 6, True)
    ] * 2
    # Saving leaves the model as it trains.
    assert prepared.model.peft_config["default"].r == 2


def unchanged(model, fresh):
    state, expected = model.state_dict(), fresh.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[key], expected[key]) for key in expected
    )


@pytest.mark.parametrize("name", ["pissa", "lora-ga"])
def test_a_rank_beyond_a_matrix_is_named_before_anything_changes(prepared_by, tiny_llama, name):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"`r` is too large for model\.layers\.0\.self_attn"):
        prepared_by(name, model, r=16)
    assert unchanged(model, tiny_llama())


def test_a_shared_weight_is_not_taken_apart(prepared_by, tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="lm_head shares its weight"):
        prepared_by("pissa", model, r=2, target_modules=["lm_head", "q_proj"])
    assert unchanged(model, tiny_llama(tie_word_embeddings=True))


def test_an_initial_adapter_of_another_model_is_refused(prepared_by, tiny_llama):
    plan = prepared_by("pissa", tiny_llama(), r=2).plan
    model = tiny_llama(num_hidden_layers=1)
    with pytest.raises(AdapterError, match=r"does not match this model: model\.layers\.1"):
        prepared_by("pissa", model, r=2, plan=plan)
    assert unchanged(model, tiny_llama(num_hidden_layers=1))


def test_corda_leaves_a_bad_sample_out_where_that_is_asked_for(prepared_by, tiny_llama, batches):
    last = tiny_llama().config.vocab_size - 1
    good = [b | {"input_ids": b["input_ids"].clamp(max=last - 1)} for b in batches]
    bad = good[1] | {"input_ids": good[1]["input_ids"].clone()}
    bad["input_ids"][0, 0] = last

    def started(data):
        model = tiny_llama(initializer_range=0.2)
        with torch.no_grad():
            model.get_input_embeddings().weight[last] = torch.inf
        return prepared_by("corda", model, r=2, data=data).plan.modules

    with pytest.raises(CalibrationError, match="not finite"):
        started([good[0], bad])
    with pytest.warns(UserWarning, match="1 of 6 calibration samples are bad and were skipped"):
        skipped = started(Samples([good[0], bad], skip_bad_samples=True))
    left = started([good[0], {key: value[1:] for key, value in good[1].items()}])
    for name, (a, b) in left.items():
        first, second = skipped[name]
        torch.testing.assert_close(second @ first, b @ a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["corda", "lora-ga", "eva"])
def test_a_batch_that_fails_leaves_the_model_as_it_was(prepared_by, tiny_llama, batches, name):
    model = tiny_llama()
    modes = [module.training for module in model.modules()]
    broken = [batches[0], {"input_ids": torch.full((3, 9), 10**6)}]
    with pytest.raises(Exception, match=r".+"):
        prepared_by(name, model, data=broken, r=2, target_modules=["q_proj", "up_proj"])
    assert unchanged(model, tiny_llama())
    assert [module.training for module in model.modules()] == modes
    for module in model.modules():
        assert not any(held for key, held in vars(module).items() if key.endswith("_hooks"))
        assert not any(key.startswith("_peft") for key in vars(module))
    assert all(parameter.grad is None for parameter in model.parameters())
