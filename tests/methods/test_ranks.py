"""Methods that decide ranks: DyLoRA, GeLoRA and GoRA; and EDoRA, whose r x r matrix trains."""

import math
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file

from support import Toy, causal_samples, padded, toy_batch, toy_samples, train
from tlora.adapter.freeze import lora_layers
from tlora.adapter.nested import DrawRank, LeadingRanks
from tlora.adapter.stock import targets_of
from tlora.calibration import hidden_states
from tlora.calibration.batches import single_samples
from tlora.errors import CalibrationError, ConfigError
from tlora.exporters import export
from tlora.exporters.exportconfig import ExportConfig
from tlora.linalg.intrinsic import two_nn
from tlora.methods.gora import shared_ranks
from tlora.registry import METHODS


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def bias_of(module):
    return 0 if module.bias is None else module.bias


def ranks_of(model):
    return {n: len(factors(layer)[0]) for n, layer in lora_layers(model.base_model.model)}


def drawing(prepared, step, seed=3):
    [callback] = prepared.callbacks
    callback.on_step_begin(SimpleNamespace(seed=seed), SimpleNamespace(global_step=step), None)
    return callback.ranks.count


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_dylora_sees_the_first_ranks_at_their_own_scale(
    prepared_by, tiny_llama, batches, frozen
):
    prepared = prepared_by("dylora", tiny_llama(), r=4, lora_alpha=6, frozen=frozen)
    train(prepared.model, batches[0], steps=2)
    prepared.callbacks[0].ranks.count = 3
    [(_, layer), *_] = lora_layers(prepared.model)
    a, b = factors(layer)
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    weight = layer.base_layer.weight.double() + 6 / 3 * (b.double()[:, :3] @ a.double()[:3])
    output = layer(x)
    torch.testing.assert_close(output, (x.double() @ weight.T).float(), rtol=1e-4, atol=1e-6)
    a.grad = b.grad = None
    output.square().sum().backward()
    torch.testing.assert_close(x.grad, (2 * output.double() @ weight).float(), rtol=1e-4, atol=1e-5)
    trained = [2] if frozen else [0, 1, 2]
    assert a.grad.abs().sum(dim=1).nonzero().flatten().tolist() == trained
    assert b.grad.abs().sum(dim=0).nonzero().flatten().tolist() == trained


def test_dylora_draws_by_the_seed_and_the_step_alone(prepared_by, tiny_llama):
    prepared = prepared_by("dylora", tiny_llama(), r=5, r_min=2)
    drawn = [drawing(prepared, step) for step in range(120)]
    assert {count: drawn.count(count) > 15 for count in drawn} == dict.fromkeys([2, 3, 4, 5], True)
    again = SimpleNamespace(callbacks=[DrawRank(LeadingRanks(), 2, 5)])
    assert [drawing(again, step) for step in (119, 40)] == [drawn[119], drawn[40]]
    assert [drawing(again, step, seed=4) for step in range(120)] != drawn
    prepared.callbacks[0].on_step_end(None, None, None)
    assert prepared.callbacks[0].ranks.count is None


def test_a_smallest_rank_above_the_largest_is_refused(prepared_by, tiny_llama):
    with pytest.raises(ConfigError, match="`r_min` is 5; give at most `r` \\(4\\)"):
        prepared_by("dylora", tiny_llama(), r=4, r_min=5)


@pytest.mark.parametrize("rank", [1, 3])
def test_an_export_of_dylora_is_what_was_trained_at_that_rank(
    prepared_by, tiny_llama, batches, saved, tmp_path, rank
):
    base = saved(tiny_llama())
    prepared = prepared_by("dylora", tiny_llama(), r=4, lora_alpha=6)
    train(prepared.model, batches[0], steps=2)
    prepared.save(tmp_path / "whole")
    config = ExportConfig(
        path=str(tmp_path / "whole"),
        output_dir=str(tmp_path / "cut"),
        format="native",
        max_rank=rank,
        model=base,
    )
    assert (
        f"Truncated to the first {rank} ranks at scale alpha / {rank}"
        in export.run(config).notes[0]
    )
    cut = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut").eval()
    prepared.callbacks[0].ranks.count = rank
    model = prepared.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(cut(**batches[0]).logits, model(**batches[0]).logits)
        prepared.callbacks[0].ranks.count = None
        assert not torch.allclose(cut(**batches[0]).logits, model(**batches[0]).logits)


def test_an_export_of_dylora_at_its_own_rank_says_that_nothing_was_truncated(
    prepared_by, tiny_llama, saved, tmp_path
):
    prepared_by("dylora", tiny_llama(), r=4).save(tmp_path / "whole")
    config = ExportConfig(
        path=str(tmp_path / "whole"),
        output_dir=str(tmp_path / "cut"),
        format="native",
        max_rank=64,
        model=saved(tiny_llama()),
    )
    assert "No module has a rank above 64; nothing was truncated." in export.run(config).notes
    cut, whole = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("cut", "whole"))
    assert all(torch.equal(cut[name], matrix) for name, matrix in whole.items())


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_edora_moves_the_direction_between_the_factors_of_w_and_the_magnitude(
    prepared_by, request, batches, family
):
    base = request.getfixturevalue(family)()
    model = prepared_by("edora", base, r=3, lora_alpha=6, sigma=0.01).model
    starts = {n: layer.lora_B["default"].core.detach().clone() for n, layer in lora_layers(model)}
    drawn = torch.cat([core.flatten() for core in starts.values()])
    assert drawn.std().item() == pytest.approx(0.01, rel=0.3)
    train(model, batches[0], steps=3)
    for name, layer in lora_layers(model):
        weight = layer.base_layer.weight.double()
        weight = weight.T if layer.fan_in_fan_out else weight
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        core = layer.lora_B["default"].core
        assert not torch.equal(core, starts[name])
        a, left = layer.lora_A["default"].weight, layer.lora_B["default"].left
        part = (u[:, :3] * s[:3] @ vh[:3]).float()
        torch.testing.assert_close(left @ a, part, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(left.T @ left, torch.eye(3), rtol=1e-5, atol=1e-5)
        moved = weight + 6 / 3 * left.double() @ core.double() @ a.double()
        magnitude = layer.lora_magnitude_vector["default"].weight.double()
        assert not torch.allclose(magnitude, weight.norm(dim=1))
        rows = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
        x = torch.randn(2, layer.in_features)
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x), (x.double() @ rows.T).float(), rtol=1e-4, atol=1e-6
            )


def test_edora_refuses_more_components_than_a_matrix_has(prepared_by, tiny_llama):
    with pytest.raises(ConfigError, match=r"`r` is too large for .*q_proj.* 99 of its components"):
        prepared_by("edora", tiny_llama(), r=99)


def test_gelora_measures_the_hidden_states_of_each_block(prepared_by, tiny_llama, batches):
    model = tiny_llama(initializer_range=0.4)
    points = {index: ([], []) for index in range(2)}

    def note(index, args, output):
        for held, each in zip(points[index], (args[0], output), strict=True):
            held.append(each[0].mean(dim=0))

    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda _, *seen, index=index: note(index, *seen))
    with torch.no_grad():
        for batch in batches:
            for sample in single_samples(batch, model):
                model(**sample)
    expected = {}
    for index, (before, after) in points.items():
        growth = two_nn(torch.stack(after)) - two_nn(torch.stack(before))
        expected[index] = math.ceil(max(growth, 0)) + 1
    prepared = prepared_by("gelora", tiny_llama(initializer_range=0.4), r=2, lora_alpha=6)
    found = ranks_of(prepared.model)
    assert found == {name: expected[int(name.split(".")[2])] for name in found}
    assert len(set(found.values())) == 2
    assert {layer.scaling["default"] for _, layer in lora_layers(prepared.model)} == {3.0}


@pytest.mark.parametrize("name", ["gelora", "gora", "dylora"])
def test_other_architectures_are_adapted_too(prepared_by, tiny_gpt2, tiny_t5, batches, name):
    for make in (tiny_gpt2, tiny_t5):
        task = "SEQ_2_SEQ_LM" if make is tiny_t5 else "CAUSAL_LM"
        model = prepared_by(name, make(), r=2, task_type=task).model
        train(model, batches[0], steps=1)
        assert all(factors(layer)[1].any() for _, layer in lora_layers(model))


def test_geloras_rank_is_the_growth_of_the_dimension_and_one(
    prepared_by, tiny_bert_classifier, monkeypatch
):
    found = {"bert.encoder.layer.0": (3.2, 7.9), "bert.encoder.layer.1": (5.0, 2.0)}
    monkeypatch.setattr(hidden_states, "block_dimensions", lambda *_: found)
    prepared = prepared_by("gelora", tiny_bert_classifier(), r=4, task_type="SEQ_CLS")
    ranks = ranks_of(prepared.model)
    assert {rank for name, rank in ranks.items() if ".layer.0." in name} == {6}
    assert {rank for name, rank in ranks.items() if ".layer.1." in name} == {1}
    assert ranks["bert.pooler.dense"] == 4


def test_equal_samples_are_one_point_whatever_their_padding(tiny_llama):
    model = tiny_llama(initializer_range=0.4)
    samples = causal_samples((9, 8, 10, 7, 12, 6))
    targets = targets_of(model, METHODS.load("lora").options(task_type="CAUSAL_LM"))
    again = [padded(samples[:3], length=30), padded(samples[2:5], length=25)]
    once, more = (
        hidden_states.block_dimensions(model, targets, [padded(samples), *others])
        for others in ([], again)
    )
    assert once.keys() == more.keys()
    for name, dimensions in once.items():
        assert more[name] == pytest.approx(dimensions, rel=1e-3)


class Unused(Toy):
    """Its second layer does not run."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 8)}) for _ in range(1)
        )


def test_gelora_names_a_block_that_does_not_run(prepared_by):
    samples = [toy_batch(toy_samples((4, 2, 6, 3)))]
    with pytest.raises(CalibrationError, match=r"layers\.0: no calibration sample reaches it"):
        prepared_by("gelora", Unused(), data=samples, task_type=None, target_modules=["linear"])


def test_gelora_says_what_it_has_nothing_to_go_by(prepared_by, tiny_llama, batches):
    with pytest.raises(CalibrationError, match="gave no sample"):
        prepared_by("gelora", tiny_llama(), data=[])
    one = [{key: value[:1] for key, value in batches[0].items()}]
    with pytest.raises(
        CalibrationError, match=r"layers\.0: .* \(too few distinct points \(1\)\); give more"
    ):
        prepared_by("gelora", tiny_llama(), data=one)


def gradients(model, batches):
    """The mean over samples, by autograd."""
    model.requires_grad_(True)
    samples = [sample for batch in batches for sample in single_samples(batch, model)]
    for sample in samples:
        (model(**sample).loss / len(samples)).backward()
    return lambda name: model.get_submodule(name).weight.grad.double()


def test_gora_starts_with_a_step_against_the_gradient(prepared_by, tiny_llama, batches):
    model = tiny_llama(initializer_range=0.2)
    gradient_of = gradients(model, batches)
    options = {"r": 3, "lora_alpha": 5, "gamma": 0.1, "r_min": 1, "r_max": 6}
    prepared = prepared_by("gora", tiny_llama(initializer_range=0.2), **options)
    layers = dict(lora_layers(prepared.model.base_model.model))
    shares, sizes = {}, {}
    for name in layers:
        weight = model.get_submodule(name).weight.double()
        shares[name] = (weight * gradient_of(name)).abs().mean().item()
        sizes[name] = sum(weight.shape)
    budget = sum(3 * math.sqrt(size) for size in sizes.values())
    found = ranks_of(prepared.model)
    for name, layer in layers.items():
        wanted = budget * shares[name] / sum(shares.values()) / math.sqrt(sizes[name])
        rank = min(max(round(wanted), 1), 6)
        assert found[name] == rank
        assert layer.scaling["default"] == pytest.approx(5 / math.sqrt(rank))
        a, b = (each.detach().double() for each in factors(layer))
        gradient = gradient_of(name)
        closest = torch.linalg.lstsq(a.T, -gradient.T).solution.T @ a
        step = 0.1 * math.sqrt(a.shape[1] / rank) * closest
        torch.testing.assert_close(layer.scaling["default"] * b @ a, step, rtol=1e-3, atol=1e-6)
    assert len(set(found.values())) > 2
    with torch.no_grad():
        first, last = (sum(m(**b).loss for b in batches) for m in (model, prepared.model))
    assert last < first


def test_goras_ranks_share_the_budget_within_their_bounds():
    assert shared_ranks([1.0] * 3, [32, 32, 32], 8, (4, 32)) == [8, 8, 8]
    assert shared_ranks([9.0, 0.0, 0.0], [32, 32, 32], 8, (4, 20)) == [20, 4, 4]
    assert shared_ranks([1.0, 1.0], [64, 16], 6, (1, 99)) == [round(4.5), 9]
    assert shared_ranks([0.0, 0.0], [64, 16], 6, (2, 99)) == [2, 2]


def test_goras_bounds_follow_its_rank_and_must_be_in_order(prepared_by, tiny_llama):
    from tlora.methods.gora import GoraOptions

    assert GoraOptions().bounds == (4, 32)  # the paper's
    assert GoraOptions(r=1).bounds == (1, 4)
    with pytest.raises(ConfigError, match="`r_min` is 9; give at most `r_max` \\(8\\)"):
        GoraOptions(r=2, r_min=9)
