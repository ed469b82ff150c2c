"""Mean gradients, the moments they weight and squared gradients, against autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe
import support
from support import Sample, Toy, distance, toy_batch, toy_samples
from tlora import Calibration, TLoraConfig, calibrate, plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.accumulators import GradientAccumulator
from tlora.errors import CalibrationError

BASES = ["gradient", "gradient-covariance", "gradient-moment", "weight-gradient-moment"]


def config(basis: str = "gradient", **fields: Any) -> TLoraConfig:
    return TLoraConfig(
        **({"r": 2, "lora_alpha": 2, "sensitivity_rule": "fisher"} | fields), basis=basis
    )


@dataclass
class Expected:
    """docs/method.md, 9, in float64."""

    fisher: float
    gradient: Tensor
    moment: Tensor


def by_autograd(model: Any, samples: Sequence[Sample], names: Iterable[str]) -> dict[str, Expected]:
    """Follow the definition, one sample at a time: N from each token's gradient of the output."""
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for name, seen in calls.items():
        module = model.get_submodule(name)
        module.weight.requires_grad_(True)
        module.register_forward_hook(
            lambda _, x, kw, y, to=seen: _note(to, x[0] if x else kw["input"], y),
            with_kwargs=True,
        )
    found = {}
    for name in calls:
        weight = as_matrix(model.get_submodule(name), model.get_submodule(name).weight)
        square = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        found[name] = Expected(0.0, torch.zeros_like(weight), square)
    for sample in samples:
        for seen in calls.values():
            seen.clear()
        model.zero_grad(set_to_none=True)
        loss = model(**support.as_double(sample)).loss
        if not loss.requires_grad:
            continue
        loss.backward()
        for name, want in found.items():
            module = model.get_submodule(name)
            if module.weight.grad is None:
                continue
            gradient = as_matrix(module, module.weight.grad)
            want.gradient += gradient / len(samples)
            want.fisher += gradient.square().mean().item() / len(samples)
            for x, y in calls[name]:
                if y.grad is not None:
                    rows = x.detach().reshape(-1, x.shape[-1])
                    size = y.grad.reshape(len(rows), -1).square().sum(dim=1)
                    want.moment += rows.T @ (size[:, None] * rows) / len(samples)
    return found


def _note(to: list[tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> None:
    y.retain_grad()
    to.append((x, y))


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.detach().T if hasattr(module, "nx") else weight.detach()


def assert_agrees(stats: Calibration, expected: dict[str, Expected]) -> None:
    assert list(stats.modules) == list(expected)
    for name, module in stats.modules.items():
        want = expected[name]
        if module.gradient is not None:
            assert module.gradient.dtype == torch.float32
            assert distance(module.gradient, want.gradient) < 1e-4, name
        if module.gradient_moment is not None:
            assert distance(module.gradient_moment.covariance(), want.moment) < 1e-4, name
        if module.fisher is not None:
            assert module.fisher == pytest.approx(want.fisher, rel=1e-4), name


@pytest.mark.parametrize("size", [2])
def test_padded_batches_give_what_the_samples_give_one_at_a_time(family, size):
    names = None
    for basis in ("gradient", "weight-gradient-moment"):
        stats = calibrate(family.model, family.batches(size), config(basis, **family.config))
        names = names or by_autograd(family.model, family.samples, stats.modules)
        assert stats.samples == len(family.samples)
        assert_agrees(stats, names)
        module = next(iter(stats.modules.values()))
        assert module.fisher is not None
        assert (module.sensitivity, module.moment) == (None, None)
        assert (module.gradient is None) is (basis != "gradient")
        assert (module.gradient_moment is None) is (basis == "gradient")


def held(stats: Calibration) -> dict[str, tuple[Any, ...]]:
    """Everything that a calibration holds of each module, as it would be saved."""
    return {
        name: (
            module.sensitivity,
            module.fisher,
            module.gradient,
            *(part for m in (module.moment, module.gradient_moment) if m for part in values(m)),
        )
        for name, module in stats.modules.items()
    }


def values(moment: Any) -> list[Any]:
    return [*moment.parts().values(), moment.samples, moment.tokens]


def assert_same(left: Calibration, right: Calibration) -> None:
    one, other = held(left), held(right)
    assert list(one) == list(other)
    for name, each in one.items():
        for value, expected in zip(each, other[name], strict=True):
            equal = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
            assert equal(value, expected), name


def assert_close(left: Calibration, right: Calibration) -> None:
    for name, module in left.modules.items():
        other = right.modules[name]
        assert module.fisher == pytest.approx(other.fisher, rel=1e-5)
        for value, expected in zip(matrices(module), matrices(other), strict=True):
            assert distance(value, expected) < 1e-5, name


def matrices(module: Any) -> list[Tensor]:
    moments = [m.covariance() for m in (module.moment, module.gradient_moment) if m]
    return moments + ([] if module.gradient is None else [module.gradient])


def batches(count: int = 2) -> list[Sample]:
    """Enough tokens that the moments of some modules are formed, and those of others are rows."""
    samples = [s for seed in range(count) for s in support.causal_samples(seed=seed)]
    return support.in_batches(samples, 2)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(initializer_range=0.2)


@pytest.mark.parametrize("basis", BASES)
def test_what_is_saved_is_loaded_to_the_bit(model, basis, tmp_path):
    stats = calibrate(model, batches(), config(basis))
    assert_same(Calibration.load(stats.save(tmp_path)), stats)


def test_a_file_serves_what_needs_less_and_is_refused_for_more(model, tmp_path):
    path = tmp_path / "calibration.safetensors"
    stats = calibrate(model, batches(), config("gradient-covariance"), cache=path)
    flat = {"allocate_rank": False, "allocate_scale": False}
    for fields in ({"basis": "gradient"}, {"basis": "covariance"}, {"basis": "random"} | flat):
        assert_same(calibrate(model, batches(), config(**fields), cache=path), stats)
    for fields in ({"basis": "gradient-moment"}, {"sensitivity_rule": "magnitude"}):
        with pytest.raises(CalibrationError, match="lacks required statistics"):
            calibrate(model, batches(), config(**fields), cache=path)


@pytest.mark.parametrize(
    ("basis", "rule"), zip(BASES, ["magnitude", "fisher", "fisher", "magnitude"], strict=True)
)
def test_blocks_plan_what_one_pass_plans_to_the_bit(model, basis, rule):
    fields = {"sensitivity_rule": rule, "whiten": "half"}
    whole = config(basis, **fields)
    expected = plan(model, calibrate(model, batches(), whole), whole).modules
    for budget in (1, 9000):
        made = config(basis, **fields, memory_budget=budget)
        found = plan_in_blocks(model, batches(), made)
        assert found.info["passes"] > 1
        for name, module in found.modules.items():
            assert torch.equal(module.lora_A, expected[name].lora_A), name
            assert (module.rank, module.scale) == (expected[name].rank, expected[name].scale)


@pytest.mark.parametrize("basis", BASES)
def test_no_more_gradients_are_held_than_the_budget_takes(model, basis, monkeypatch):
    add, most = GradientAccumulator.update, []

    def watched(accumulator: GradientAccumulator, *args: Any) -> None:
        add(accumulator, *args)
        moments = sum(4 * moment.dim**2 for moment in accumulator.moments.values())
        most.append(moments + sum(4 * total.numel() for total in accumulator.totals.values()))

    monkeypatch.setattr(GradientAccumulator, "update", watched)
    plan_in_blocks(model, batches(), config(basis, memory_budget=9000))
    assert 2000 < max(most) <= 9000
    most.clear()
    plan_in_blocks(model, batches(), config(basis))
    assert max(most) > 9000


@pytest.mark.parametrize(("basis", "allocate"), zip(BASES, [True, False, False, True], strict=True))
def test_bad_samples_are_left_out_as_if_not_given_to_the_bit(basis, allocate):
    model = support.seeded(SteepForSequenceClassification)
    fields = {"allocate_rank": allocate, "allocate_scale": allocate, "target_modules": ["first"]}
    made = config(basis, **fields)
    samples = toy_samples([3] * 6)
    samples[1]["inputs_embeds"][0, 0, 0] = STEEP
    samples[4]["inputs_embeds"][0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="gradient of the loss is not finite on sample 1"):
        calibrate(model, [toy_batch(samples[:3])], made)
    with pytest.warns(UserWarning, match="^2 of 6 calibration samples"):
        stats = calibrate(
            model, [toy_batch(samples[:3]), toy_batch(samples[3:])], made, skip_bad_samples=True
        )
    good = [toy_batch([samples[0], samples[2]]), toy_batch([samples[3], samples[5]])]
    assert_same(stats, calibrate(model, good, made))


STEEP = 8.0


class SteepForSequenceClassification(Toy):
    """Where a sample begins with 8, the gradient of its loss is not finite, though all else is."""

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        hidden = self.first(x)
        return torch.where(x[:, :1, :1] == STEEP, 0 * hidden, hidden.square() + 1).sqrt()


class TwiceForSequenceClassification(Toy):
    """Calls one module twice, shares a weight between two, and leaves one without an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        self.idle(x)
        return self.second(self.first(self.first(x).tanh()).tanh())


def test_calls_add_up_and_what_moves_no_loss_has_no_gradient():
    model = support.seeded(TwiceForSequenceClassification)
    samples, names = toy_samples(), ["first", "second", "idle"]
    apart = copy.deepcopy(model)
    apart.second.weight = nn.Parameter(model.second.weight.detach().clone())
    expected = by_autograd(apart, samples, names)
    for basis in BASES:
        made = config(basis, target_modules=names)
        stats = calibrate(model, [toy_batch(samples)], made)
        assert_agrees(stats, expected)
        assert stats.modules["idle"].fisher == 0.0
        assert all(m.count_nonzero() == 0 for m in matrices(stats.modules["idle"])[-1:])
        # The leading directions of W complete what the loss does not determine.
        assert plan(model, stats, made).modules["idle"].lora_A.norm(dim=1).allclose(torch.ones(1))


@pytest.mark.parametrize("make", [moe.mixtral, moe.gpt_oss])
def test_experts_have_gradients_of_their_own(make):
    model, samples = make(), support.causal_samples((7, 3, 10, 5, 2))
    double = copy.deepcopy(model).double().requires_grad_(False)
    double.config._experts_implementation = "eager"
    totals, squares = {}, {}
    for name in moe.fused(model):
        parameter = double.get_parameter(name).requires_grad_(True)
        totals[name], squares[name] = torch.zeros_like(parameter), 0.0
    for sample in samples:
        double.zero_grad()
        double(**sample).loss.backward()
        for name in totals:
            gradient = double.get_parameter(name).grad
            totals[name] += gradient / len(samples)
            squares[name] += gradient.square().mean().item() / len(samples)
    found = {
        basis: calibrate(
            model, support.in_batches(samples, 3), config(basis, target_parameters=moe.BOTH)
        )
        for basis in ("gradient", "gradient-moment")
    }
    for name, total in totals.items():
        of_expert = [found["gradient"].modules[f"{name}[{e}]"] for e in range(moe.EXPERTS)]
        fisher = sum(expert.fisher for expert in of_expert) / moe.EXPERTS
        assert fisher == pytest.approx(squares[name], rel=1e-4)
        for number, expert in enumerate(of_expert):
            matrix = total[number].T if "GptOss" in type(model).__name__ else total[number]
            assert distance(expert.gradient, matrix) < 1e-4
            # N is positive, and reaches where G does: v G = 0 wherever v N = 0.
            weighted = found["gradient-moment"].modules[expert.name].gradient_moment
            values, vectors = torch.linalg.eigh(weighted.covariance().double())
            assert values[0] > -1e-5 * values[-1]
            outside = vectors[:, values < 1e-7 * values[-1]]
            assert (matrix @ outside).norm() < 1e-2 * matrix.norm()
    made = config("gradient", target_parameters=moe.BOTH)
    stacked = plan(model, found["gradient"], made).modules
    for name in totals:
        rank, rows = stacked[name].rank, stacked[name].lora_A
        _, _, vectors = torch.linalg.svd(found["gradient"].modules[f"{name}[1]"].gradient)
        overlap = (rows[rank : 2 * rank] @ vectors[:rank].T).square().sum() / rank
        assert overlap.item() == pytest.approx(1.0, abs=1e-3)
