"""Planning in blocks: the plan of one block to the bit, of a calibration up to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from support import make_family
from tlora import AdapterPlan, TLoraConfig, calibrate, get_tlora_model, plan
from tlora.adapter import blocks
from tlora.adapter.attach import made_plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.accumulators import MomentAccumulator, moment_bytes
from tlora.calibration.budget import MemoryBudget
from tlora.calibration.weights import Target, dense_weight
from tlora.errors import ConfigError
from tlora.linalg.crossmoment import CrossMoment
from tlora.linalg.moments import SecondMoment

ONE_MOMENT = 1  # no two moments fit: a block for each group


def assert_same(left: AdapterPlan, right: AdapterPlan) -> None:
    assert list(left.modules) == list(right.modules)
    for name, module in left.modules.items():
        other = right.modules[name]
        assert torch.equal(module.lora_A, other.lora_A), name
        for field in ("rank", "scale", "captured_energy", "sensitivity", "solver"):
            assert getattr(module, field) == getattr(other, field), (name, field)


def assert_close(left: AdapterPlan, right: AdapterPlan) -> None:
    """Check that two plans differ by rounding alone: of W C from outputs and from C."""
    assert list(left.modules) == list(right.modules)
    for name, module in left.modules.items():
        other = right.modules[name]
        for field in ("rank", "scale", "sensitivity", "solver"):
            assert getattr(module, field) == getattr(other, field), (name, field)
        assert module.captured_energy == pytest.approx(other.captured_energy, abs=1e-5)
        torch.testing.assert_close(module.lora_A, other.lora_A, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["llama-left", "bert", "t5", "vit"])
def test_the_plan_is_that_of_one_block_to_the_bit(name, request):
    family = make_family(name, request.getfixturevalue)
    batches = family.batches(2)
    whole = TLoraConfig(**family.config)
    expected = plan_in_blocks(family.model, batches, whole)
    assert_close(expected, plan(family.model, calibrate(family.model, batches, whole), whole))
    for budget in (ONE_MOMENT, 5000):
        config = TLoraConfig(**family.config, memory_budget=budget, covariance="exact")
        found = plan_in_blocks(family.model, iter(batches), config)
        assert_same(found, expected)
        assert found.info["passes"] > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"allocate_rank": False, "allocate_scale": False},
        {"whiten": True},
        {"rank_min": 0},
    ],
)
def test_every_configuration_gives_the_plan_of_one_block(tiny_llama, fields, request):
    family = make_family("llama-right", request.getfixturevalue)
    whole = TLoraConfig(**family.config, **fields, covariance="exact")
    config = replace(whole, memory_budget=ONE_MOMENT)
    batches = family.batches(2)
    expected = plan_in_blocks(family.model, batches, whole)
    assert_close(expected, plan(family.model, calibrate(family.model, batches, whole), whole))
    assert_same(plan_in_blocks(family.model, batches, config), expected)


def held_bytes(moment: SecondMoment | CrossMoment) -> int:
    if isinstance(moment, CrossMoment):
        return moment.total.nbytes
    return moment_bytes(moment.dim)


def test_the_moments_alive_never_exceed_the_budget(request, monkeypatch):
    family = make_family("llama-right", request.getfixturevalue)
    budget = 3000  # two moments of 16 columns, or one of 32 beside none
    seen: list[int] = []
    update = MomentAccumulator.update

    def watch(accumulator: MomentAccumulator, *args: Any) -> None:
        update(accumulator, *args)
        kept = [moment for moment in accumulator.moments.values() if moment is not None]
        seen.append(sum(map(held_bytes, kept)))

    monkeypatch.setattr(MomentAccumulator, "update", watch)
    config = TLoraConfig(**family.config, memory_budget=budget, covariance="exact")
    plan_in_blocks(family.model, family.batches(2), config)
    largest_alone = 32 * 32 * 4
    assert max(seen) <= max(budget, largest_alone)
    assert len(set(seen)) > 1


def test_later_passes_stop_after_the_last_module_they_are_for(request):
    family = make_family("llama-right", request.getfixturevalue)
    ran: list[str] = []
    head = family.model.get_output_embeddings()
    head.register_forward_hook(lambda *_: ran.append("head"))
    first = family.model.model.layers[0]
    first.register_forward_hook(lambda *_: ran.append("layer 0"))
    config = TLoraConfig(**family.config, memory_budget=ONE_MOMENT, covariance="exact")
    batches = family.batches(2)
    found = plan_in_blocks(family.model, batches, config)
    assert found.info["passes"] == 8  # four groups a layer, two layers
    # The look at the first batch that finds shared inputs, and the pass that runs everything,
    # which has kept the last moment of all.
    assert ran.count("head") == 1 + len(batches)
    # Blocks 2 to 5 end inside layer 0; 6 to 8 are of layer 1.
    assert ran.count("layer 0") == 1 + len(batches) * (1 + 3)


class Twice(nn.Module):
    """One projection that runs twice, with another between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        hidden = self.shared(self.between(self.shared(inputs_embeds).tanh()).tanh())
        return {"loss": (hidden.mean(dim=(1, 2)) - labels).square().mean()}


def test_a_module_that_runs_twice_is_seen_twice_in_every_block():
    torch.manual_seed(0)
    model = Twice()
    batches = [{"inputs_embeds": torch.randn(3, 5, 8), "labels": torch.randn(3)}]
    fields: dict[str, Any] = {"r": 2, "target_modules": ["shared", "between"]}
    expected = plan(model, calibrate(model, batches, TLoraConfig(**fields)), TLoraConfig(**fields))
    config = TLoraConfig(**fields, memory_budget=1, covariance="exact")
    assert_same(plan_in_blocks(model, batches, config), expected)


class Routed(nn.Module):
    """Three projections; a batch reaches the first and one of the other two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, inputs_embeds: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        hidden = self.first(inputs_embeds).tanh()
        hidden = (self.left if labels[0] > 0 else self.right)(hidden)
        return {"loss": (hidden.mean(dim=(1, 2)) - labels).square().mean()}


@pytest.mark.parametrize("budget", [1, 2 * 8 * 8 * 4])
def test_a_module_that_the_first_batch_does_not_reach_gets_its_moment_in_blocks(budget):
    torch.manual_seed(0)
    model = Routed()
    batches = [
        {"inputs_embeds": torch.randn(1, 5, 8), "labels": torch.tensor([sign])}
        for sign in (1.0, -1.0, 1.0)
    ]
    fields: dict[str, Any] = {"r": 2, "target_modules": ["first", "left", "right"]}
    expected = plan(model, calibrate(model, batches, TLoraConfig(**fields)), TLoraConfig(**fields))
    config = TLoraConfig(**fields, memory_budget=budget, covariance="exact")
    assert_same(plan_in_blocks(model, batches, config), expected)


def test_the_strategy_is_told_before_anything_is_measured(request, caplog, monkeypatch):
    family = make_family("llama-right", request.getfixturevalue)
    config = TLoraConfig(**family.config, memory_budget=ONE_MOMENT, covariance="exact")
    monkeypatch.setattr(blocks, "first_pass", lambda *_, **__: pytest.fail("too early"))
    with caplog.at_level("INFO", "tlora"), pytest.raises(pytest.fail.Exception):
        plan_in_blocks(family.model, family.batches(2), config)
    assert "14 modules exactly, in 8 blocks; it reads the samples 8 times" in caplog.text


def test_without_a_cache_one_pass_reads_batch_by_batch_to_the_plan_of_a_calibration(request):
    family = make_family("llama-right", request.getfixturevalue)
    config = TLoraConfig(**family.config)
    batches = family.batches(2)
    expected = plan(family.model, calibrate(family.model, batches, config), config)
    ran: list[int] = []
    hook = family.model.register_forward_pre_hook(lambda *_: ran.append(len(read)))
    read: list[Any] = []

    def each() -> Any:
        for batch in batches:
            read.append(batch)
            yield batch

    found = made_plan(family.model, each(), config, cache=None)
    hook.remove()
    assert_close(found, expected)
    assert ran == list(range(1, len(batches) + 1))  # no batch is read ahead, none twice
    assert expected.info.items() <= found.info.items()
    assert found.config == expected.config
    record = found.info["calibration"]
    assert (record["memory_budget"], record["blocks"], record["passes"]) == (None, 1, 1)
    assert "exactly, all at once" in record["strategy"]


def test_an_automatic_budget_is_resolved_once_told_and_noted(request, monkeypatch, caplog):
    family = make_family("llama-right", request.getfixturevalue)
    config = TLoraConfig(**family.config, covariance="exact")
    batches = family.batches(2)
    given = plan_in_blocks(family.model, batches, replace(config, memory_budget=3000))
    asked = []

    def resolved(*_: Any) -> MemoryBudget:
        asked.append(1)
        return MemoryBudget(3000, "1/20 of the 60000 B that the weights leave on cuda:0")

    monkeypatch.setattr(blocks, "resolved", resolved)
    with caplog.at_level("INFO", "tlora"):
        found = made_plan(family.model, iter(batches), config)
    assert asked == [1]
    assert_same(found, given)
    assert found.config.memory_budget == "auto"
    # The first pass holds a quarter of it, here less than any moment.
    assert found.info["passes"] == given.info["passes"] + 1 > 2
    record = dict(found.info["calibration"])
    assert record["memory_budget_from"].startswith("1/20 of")
    assert record["memory_budget"] == 3000
    assert record["held"] <= max(3000, moment_bytes(32))
    [line] = caplog.messages
    assert line.startswith(record["strategy"])
    assert line.endswith(
        "`memory_budget`: 2.9 KiB, auto: 1/20 of the 60000 B that the weights leave on cuda:0"
    )


def test_the_model_is_left_as_it_was_also_when_a_later_block_fails(request, monkeypatch):
    family = make_family("llama-right", request.getfixturevalue)
    model = family.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = iter(range(100))
    update = MomentAccumulator.update

    def fail_later(accumulator: MomentAccumulator, *args: Any) -> None:
        if next(calls) > 4:
            raise MemoryError("no more")
        update(accumulator, *args)

    monkeypatch.setattr(MomentAccumulator, "update", fail_later)
    config = TLoraConfig(**family.config, memory_budget=ONE_MOMENT, covariance="exact")
    with pytest.raises(MemoryError):
        get_tlora_model(model, config, family.batches(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def energies(found: AdapterPlan, stats: Any, model: Any) -> dict[str, float]:
    """What the plan's subspaces keep of ||W C||_F^2, by definition."""
    kept = {}
    for name, module in found.modules.items():
        product = dense_weight(target_of(model, name)) @ stats.modules[name].covariance()
        basis = torch.linalg.qr(module.lora_A.T).Q
        total = product.square().sum()
        kept[name] = ((product @ basis).square().sum() / total).item() if total > 0 else 1.0
    return kept


def target_of(model: Any, name: str) -> Target:
    module = model.get_submodule(name)
    rows, columns = module.weight.shape
    return Target(name, module, columns, rows)


@pytest.mark.parametrize(("name", "budget"), [("llama-right", 1), ("t5", None)])
def test_streamed_subspaces_keep_99_percent_of_the_exact_energy(name, budget, request):
    family = make_family(name, request.getfixturevalue)
    batches = family.batches(2)
    config = TLoraConfig(**family.config)
    stats = calibrate(family.model, batches, config)
    exact = plan(family.model, stats, config)
    streamed = TLoraConfig(**family.config, covariance="streamed", memory_budget=budget)
    found = plan_in_blocks(family.model, batches, streamed)
    kept = energies(found, stats, family.model)
    for module, other in zip(found.modules.values(), exact.modules.values(), strict=True):
        assert (module.rank, module.scale) == (other.rank, other.scale)
        assert module.solver == "streamed"
        assert other.captured_energy is not None
        assert kept[module.name] >= 0.99 * other.captured_energy


def test_whitening_goes_over_budget_rather_than_without_moments(request):
    family = make_family("llama-right", request.getfixturevalue)
    config = TLoraConfig(**family.config, memory_budget=1, whiten=True)
    found = plan_in_blocks(family.model, family.batches(2), config)
    assert {module.solver for module in found.modules.values()} == {"exact"}
    with pytest.raises(ConfigError, match="drop one"):
        TLoraConfig(whiten=True, covariance="streamed")
