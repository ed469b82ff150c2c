"""The plan against its definition: ranks, scales and subspaces written out from the statistics."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tlora import AdapterPlan, Calibration, calibrate, plan
from tlora.errors import ArtifactError, CalibrationError, PlanError

FAMILIES = ["gpt2-right", "bert", "t5"]


def weight_of(model, name: str) -> torch.Tensor:
    module = model.get_submodule(name)
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, Conv1D) else weight


@pytest.mark.parametrize("name", FAMILIES)
def test_a_spans_the_leading_right_singular_vectors_of_w_c(calibrated, name):
    base = calibrated(name)
    planned = base.plan()

    for module in planned.modules.values():
        product = (
            weight_of(base.model, module.name)
            @ base.stats.modules[module.name].covariance().double()
        )
        if product.norm() == 0:
            # A pooler sees one token a sample, so C = 0; what remains to go by is W.
            assert module.captured_energy == 1.0
            product = weight_of(base.model, module.name)
        _, values, vectors = torch.linalg.svd(product, full_matrices=False)
        a, rank = module.lora_A.double(), module.rank
        assert module.lora_A.dtype == torch.float32
        assert a.shape == (rank, product.shape[1])
        assert (a @ a.T - torch.eye(rank)).abs().max() < 1e-5
        overlap = (a @ vectors[:rank].T).square().sum() / rank
        assert overlap > 1 - 1e-4, module.name
        # The strongest direction comes first, which a server that cuts ranks off relies on.
        assert ((a[0] @ vectors[0]).abs() > 1 - 1e-4) or values[1] > 0.99 * values[0]
        if module.captured_energy < 1:
            share = values[:rank].square().sum() / values.square().sum()
            assert module.captured_energy == pytest.approx(share.item(), abs=1e-5)


def test_scales_divide_by_the_base_rank(calibrated):
    base, alpha = calibrated("llama-right"), 3.5
    planned = base.plan(lora_alpha=alpha, r=3)

    sensitivities = [module.sensitivity for module in base.stats.modules.values()]
    count, total = len(sensitivities), sum(sensitivities)
    for module, s in zip(planned.modules.values(), sensitivities, strict=True):
        assert module.scale == pytest.approx(max(alpha, round(count * alpha * s / total)) / 3)
        assert module.sensitivity == s
    assert len({module.scale for module in planned.modules.values()}) > 1
    assert len({module.rank for module in planned.modules.values()}) > 1


def with_sensitivities(stats: Calibration, values: list[float]) -> Calibration:
    changed = copy.deepcopy(stats)
    for module, value in zip(changed.modules.values(), values, strict=True):
        module.sensitivity = value
    return changed


def test_ranks_follow_the_released_rule_where_no_bound_binds(calibrated):
    base = calibrated("llama-right")
    shares = [1, 2, 3, 4, 3, 2, 1, 2, 3, 2, 1, 2, 1, 1]
    stats = with_sensitivities(base.stats, [0.01 * share for share in shares])
    assert [m.rank for m in plan(base.model, stats, base.config(r=2)).modules.values()] == shares

    # Rounding asks for 0.7 -> 1 of 13 modules and 4.9 -> 5 of one: the largest gives up four.
    stats = with_sensitivities(base.stats, [1.0] * 13 + [7.0])
    assert {m.rank for m in plan(base.model, stats, base.config(r=1)).modules.values()} == {1}


def test_the_other_scale_rules(calibrated):
    base = calibrated("llama-right")
    values = [float(i + 1) for i in range(14)]
    stats = with_sensitivities(base.stats, values)
    mean = sum(values) / 14

    def scales(**fields):
        modules = plan(base.model, stats, base.config(r=2, lora_alpha=3, **fields)).modules
        return [module.scale for module in modules.values()]

    assert scales(scale_rule="proportional") == pytest.approx([1.5 * v / mean for v in values])
    assert scales(scale_rule="constant") == scales(allocate_scale=False) == [1.5] * 14


@pytest.mark.parametrize(("frozen", "r"), [(True, 1), (False, 3)])
def test_a_parameter_budget_is_never_exceeded(calibrated, frozen, r):
    base = calibrated("gpt2-right")
    planned = base.plan(r=r, budget="params", freeze_a=frozen)
    modules = planned.modules.values()

    def cost(module) -> int:
        return module.d_out + (0 if frozen else module.d_in)

    limit = sum(r * cost(module) for module in modules)
    spent = sum(module.rank * cost(module) for module in modules)
    assert planned.trainable_parameters == spent <= limit
    # Less is left over than the dearest rank costs.
    assert limit - spent < max(cost(module) for module in modules)


@pytest.mark.parametrize("basis", ["weight-covariance", "random"])
def test_planning_twice_gives_the_same_bits(calibrated, basis):
    base = calibrated("llama-right")
    state = torch.get_rng_state()
    one, two = base.plan(basis=basis, seed=5), base.plan(basis=basis, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    for module in one.modules.values():
        other = two.modules[module.name]
        assert torch.equal(module.lora_A, other.lora_A)
        assert (module.rank, module.scale) == (other.rank, other.scale)


def test_a_random_basis_is_loras_own(calibrated):
    base = calibrated("llama-right")
    planned = base.plan(basis="random", allocate_rank=False, r=4)
    matrices = {name: module.lora_A for name, module in planned.modules.items()}
    for name, a in matrices.items():
        bound = a.shape[1] ** -0.5
        assert 0.8 * bound < a.abs().max() <= bound
        product = weight_of(base.model, name) @ base.stats.modules[name].covariance().double()
        q = torch.linalg.qr(a.double().T).Q
        energy = (product @ q).square().sum() / product.square().sum()
        assert planned.modules[name].captured_energy == pytest.approx(energy.item(), abs=1e-5)
    square = [a for a in matrices.values() if a.shape == (4, 16)]
    assert len(square) == 12
    assert not any(torch.equal(a, b) for i, a in enumerate(square) for b in square[:i])
    other = base.plan(basis="random", allocate_rank=False, r=4, seed=1)
    assert not any(torch.equal(a, other.modules[name].lora_A) for name, a in matrices.items())


def test_a_random_basis_needs_no_second_moments(calibrated):
    base = calibrated("llama-right")
    config = base.config(basis="random")
    stats = calibrate(base.model, [base.batch], config)
    assert {m.captured_energy for m in plan(base.model, stats, config).modules.values()} == {None}
    with pytest.raises(CalibrationError, match="no second moment was kept"):
        plan(base.model, stats, base.config())


@pytest.mark.parametrize("basis", ["weight-covariance", "random"])
def test_whitened_features_have_equal_variance(calibrated, basis):
    base = calibrated("llama-right")
    for module in base.plan(whiten=True, basis=basis).modules.values():
        a = module.lora_A.double()
        kernel = a @ base.stats.modules[module.name].uncentered().double() @ a.T
        kernel = kernel / kernel.diagonal().mean()
        assert (kernel - torch.eye(module.rank)).abs().max() < 2e-2, module.name
        assert a.square().sum(dim=1).mean() == pytest.approx(1.0, abs=1e-5)


def test_planning_only_reads_the_model(calibrated):
    base = calibrated("gpt2-right")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    base.plan()
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_ranks_may_be_zero(calibrated):
    base = calibrated("llama-right")
    stats = with_sensitivities(base.stats, [1.0] * 7 + [0.0] * 7)
    planned = plan(base.model, stats, base.config(rank_min=0))
    assert [module.rank for module in planned.modules.values()] == [4] * 7 + [0] * 7
    assert all(len(module.lora_A) == module.rank for module in planned.modules.values())
    assert "0 to 4" in planned.summary()


def test_bounds_that_forbid_the_budget_are_said_aloud(calibrated):
    base = calibrated("llama-right")
    with pytest.warns(UserWarning, match=r"rank_max = 3 is too small for r = 6.*42 ranks .*not 84"):
        planned = base.plan(r=6, rank_max=3)
    assert {module.rank for module in planned.modules.values()} == {3}
    assert (planned.info["budget_wanted"], planned.info["budget_spent"]) == (84, 42)
    with pytest.warns(UserWarning, match=r"rank_min = 2 is too large .*parameters in total, not"):
        base.plan(r=1, rank_min=2, budget="params")
    with pytest.warns(
        UserWarning, match=r"^r = 200 is larger than some weights allow; .*not 2,800"
    ):
        base.plan(r=200)


def test_statistics_of_another_model_are_refused(calibrated):
    llama, gpt2 = calibrated("llama-right"), calibrated("gpt2-right")
    with pytest.raises(PlanError, match=r"h\.0\.attn\.c_attn is .*no statistics of it"):
        plan(gpt2.model, llama.stats, gpt2.config())
    stats = copy.deepcopy(llama.stats)
    stats.modules["model.layers.0.mlp.up_proj"].d_out = 64
    with pytest.raises(PlanError, match=r"up_proj is 32 x 16.*holds it as 64 x 16"):
        plan(llama.model, stats, llama.config())


def test_a_calibration_without_sensitivities_cannot_allocate(calibrated):
    base = calibrated("llama-right")
    off = {"allocate_rank": False, "allocate_scale": False}
    stats = calibrate(base.model, [base.batch], base.config(**off))
    planned = plan(base.model, stats, base.config(**off))
    assert {(m.rank, m.scale, m.sensitivity) for m in planned.modules.values()} == {(2, 1.0, None)}
    for name in off:
        with pytest.raises(CalibrationError, match="no sensitivity was measured"):
            plan(base.model, stats, base.config(**off | {name: True}))


@pytest.mark.parametrize("fields", [{}, {"rank_min": 0, "freeze_a": False, "whiten": True}])
def test_what_is_loaded_is_what_was_saved(calibrated, tmp_path, fields):
    base = calibrated("llama-right")
    stats = with_sensitivities(base.stats, [1 / 3] * 7 + [0.0] * 3 + [1e-12, 2.0, 1e-30, 0.1])
    planned = plan(base.model, stats, base.config(**fields))
    path = planned.save(tmp_path)
    loaded = AdapterPlan.load(tmp_path)

    assert path.name == "plan.safetensors"
    assert loaded.config == planned.config
    assert loaded.info == planned.info
    assert list(loaded) == list(planned)
    for name, module in planned.modules.items():
        mine, other = dict(vars(module)), dict(vars(loaded.modules[name]))
        assert torch.equal(mine.pop("lora_A"), other.pop("lora_A"))
        assert mine == other
    assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_another_file_is_no_plan(calibrated, tmp_path):
    with pytest.raises(ArtifactError, match="'calibration', not 'plan'"):
        AdapterPlan.load(calibrated("llama-right").stats.save(tmp_path))


def test_the_summary_gives_the_figures(calibrated):
    base = calibrated("llama-right")
    planned = base.plan(allocate_rank=False, allocate_scale=False)
    # 2 layers: q 16, k 8, v 8, o 16, gate 32, up 32, down 16 outputs; r = 2 of each.
    assert planned.trainable_parameters == 2 * 2 * 128
    assert base.plan(allocate_rank=False, freeze_a=False).trainable_parameters == 2 * 2 * (
        128 + 128
    )
    lines = planned.summary().splitlines()
    assert lines[:2] == [
        "14 modules, each with rank 2 and scale 1",
        "512 trainable parameters (50% of LoRA's 1,024)",
    ]
    assert re.fullmatch(r"captured energy: mean 0\.\d+, lowest 0\.\d+, highest \d\.\d+", lines[2])
    modules = list(planned.modules.values())
    modules[0].scale = 2.5
    assert "14 modules, rank 2, scales 1 to 2.5" in planned.summary()
    modules[0].rank = 9
    assert "14 modules, ranks 2 to 9 (mean 2.5), scales 1 to 2.5" in planned.summary()
