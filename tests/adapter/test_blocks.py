"""Planning in blocks: the plan of `calibrate` and `plan` to the bit, within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from support import FAMILIES, make_family
from tlora import AdapterPlan, TLoraConfig, calibrate, get_tlora_model, plan
from tlora.adapter.blocks import plan_in_blocks
from tlora.calibration.bank import MomentBank

HALF_A_KILOBYTE = 512  # less than one moment of the tiny models: a block a group


def assert_same(left: AdapterPlan, right: AdapterPlan) -> None:
    assert list(left.modules) == list(right.modules)
    for name, module in left.modules.items():
        other = right.modules[name]
        assert torch.equal(module.lora_A, other.lora_A), name
        for field in ("rank", "scale", "captured_energy", "sensitivity", "solver"):
            assert getattr(module, field) == getattr(other, field), (name, field)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_that_of_one_block_to_the_bit(name, request):
    family = make_family(name, request.getfixturevalue)
    batches = family.batches(2)
    expected = plan(
        family.model,
        calibrate(family.model, batches, TLoraConfig(**family.config)),
        TLoraConfig(**family.config),
    )
    for budget in (HALF_A_KILOBYTE, 5000, None):
        config = TLoraConfig(**family.config, memory_budget=budget)
        found = plan_in_blocks(family.model, iter(batches), config)
        assert_same(found, expected)
        assert (found.info["blocks"] > 1) == (budget is not None)


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
    config = TLoraConfig(**family.config, **fields, memory_budget=HALF_A_KILOBYTE)
    batches = family.batches(2)
    expected = plan(family.model, calibrate(family.model, batches, config), config)
    assert_same(plan_in_blocks(family.model, batches, config), expected)


def test_random_bases_need_no_second_block(request):
    family = make_family("llama-right", request.getfixturevalue)
    config = TLoraConfig(**family.config, basis="random", memory_budget=HALF_A_KILOBYTE)
    assert plan_in_blocks(family.model, family.batches(2), config).info["blocks"] == 1


def test_the_moments_alive_never_exceed_the_budget(request, monkeypatch):
    family = make_family("llama-right", request.getfixturevalue)
    budget = 3000  # two moments of 16 columns, or one of 32 beside none
    seen: list[int] = []
    update = MomentBank.update

    def watch(bank: MomentBank, *args: Any) -> None:
        update(bank, *args)
        seen.append(bank.bytes)

    monkeypatch.setattr(MomentBank, "update", watch)
    config = TLoraConfig(**family.config, memory_budget=budget)
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
    config = TLoraConfig(**family.config, memory_budget=HALF_A_KILOBYTE)
    batches = family.batches(2)
    found = plan_in_blocks(family.model, batches, config)
    assert found.info["blocks"] == 8  # four groups a layer, two layers
    assert ran.count("head") == len(batches)  # the first pass alone
    # Blocks 2 and 3 end inside layer 0, block 4 with its last projection.
    assert ran.count("layer 0") == len(batches) * (1 + 4)


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
    config = TLoraConfig(**fields, memory_budget=1)
    assert_same(plan_in_blocks(model, batches, config), expected)


def test_the_model_is_left_as_it_was_also_when_a_later_block_fails(request, monkeypatch):
    family = make_family("llama-right", request.getfixturevalue)
    model = family.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = iter(range(100))
    update = MomentBank.update

    def fail_later(bank: MomentBank, *args: Any) -> None:
        if next(calls) > 4:
            raise MemoryError("no more")
        update(bank, *args)

    monkeypatch.setattr(MomentBank, "update", fail_later)
    config = TLoraConfig(**family.config, memory_budget=HALF_A_KILOBYTE)
    with pytest.raises(MemoryError):
        get_tlora_model(model, config, family.batches(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
