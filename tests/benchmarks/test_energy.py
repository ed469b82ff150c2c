"""Plans are those of the definition in float64, and the check of it finds plans that are not."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import tlora.demo
from tlora.adapter.attach import made_plan

BASE = Path(tlora.demo.__file__).parent / "base"
WAYS = ("auto", "randomized", "streamed")


@pytest.fixture
def energy(script):
    script("cost", "definition")
    script("cost", "subjects")
    return script("cost", "energy")


@pytest.fixture
def shipped(energy, tmp_path):
    """The shipped base and eight texts of unequal length."""
    texts = [f"{n} apples and {7 * n} more are {8 * n}." + " So it is." * n for n in range(2, 10)]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    flags = argparse.Namespace(text=path, samples=8, tokens=48, device="cpu", dtype="float32")
    return energy.load(BASE, flags)


@pytest.fixture
def in_bfloat16(energy, tiny_llama):
    """A tiny Llama of random weights in bfloat16."""
    model = tiny_llama(hidden_size=32, intermediate_size=64).bfloat16()
    ids = torch.randint(3, 60, (8, 20), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    parts = [{name: value[i : i + 4] for name, value in batch.items()} for i in (0, 4)]
    return energy.case("tiny", model, parts)


def row_of(energy, case, rank, dtype):
    return energy.row_of(case, rank) | {"device": "cpu", "dtype": dtype}


def test_the_shipped_base_in_float32_is_planned_as_defined(energy, shipped):
    row = row_of(energy, shipped, 8, "float32")
    assert energy.faults(row) == []
    assert row["sensitivities"] < 1e-5


def test_a_model_in_bfloat16_is_planned_as_defined_from_its_own_activations(energy, in_bfloat16):
    row = row_of(energy, in_bfloat16, 4, "bfloat16")
    assert energy.faults(row) == []
    assert row["sensitivities"] < 1e-5


def test_sensitivities_and_moments_of_the_definition_are_those_of_autograd(energy, tiny_llama):
    definition = energy.measure
    model = tiny_llama().double()
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    name = "model.layers.1.mlp.down_proj"
    found = definition(model, samples, [name])
    weight, seen, values = model.get_submodule(name).weight, [], []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    for sample in samples:
        (gradient,) = torch.autograd.grad(model(**sample).loss, weight)
        values.append((gradient * weight).abs().mean().item())
    hook.remove()
    moments = [len(x) * torch.cov(x.detach().T, correction=0) for x in seen]
    assert found.sensitivities[name] == pytest.approx(sum(values) / 3, rel=1e-12)
    torch.testing.assert_close(found.moments[name], sum(moments) / 3)


@pytest.mark.parametrize(
    ("values", "r", "bounds", "ranks", "tied"),
    [
        ([1, 2, 3], 4, (0, 12), [2, 4, 6], []),
        ([1, 1, 6], 3, (0, 9), [1, 1, 7], []),
        # 0.5, 1.5 and 7: halves round to even.
        ([0.5, 1.5, 7], 3, (0, 9), [0, 2, 7], ["a", "b"]),
        ([0.0, 1, 9], 2, (1, 4), [1, 1, 4], []),
    ],
)
def test_ranks_by_definition(energy, values, r, bounds, ranks, tied):
    names = "abc"
    found, turning = energy.share_ranks(
        dict(zip(names, map(float, values), strict=True)), r, dict.fromkeys(names, bounds)
    )
    assert [found[name] for name in names] == ranks
    assert turning == tied


def test_a_rank_may_differ_where_the_share_is_tied_and_nowhere_else(energy):
    defined = {"a": 2, "b": 3, "c": 9}
    assert energy.differing({"a": 3, "b": 3, "c": 8}, defined, ["a"]) == []
    assert energy.differing({"a": 3, "b": 3, "c": 8}, defined, []) == ["a", "c"]
    assert energy.differing({"a": 3, "b": 2, "c": 9}, defined, ["a"]) == ["b"]


def test_a_plan_with_another_basis_or_other_ranks_is_found_out(energy, in_bfloat16, monkeypatch):
    def wrong(model, batches, config, **reading):
        plan = made_plan(model, batches, config, **reading)
        first, second, *_ = plan.modules.values()
        for module, rank in ((first, first.rank + 1), (second, second.rank - 1)):
            basis = torch.randn(module.lora_A.shape)
            changed = dataclasses.replace(module, lora_A=basis, rank=rank)
            plan.modules[module.name] = changed
        return plan

    monkeypatch.setattr(energy, "made_plan", wrong)
    faults = " ".join(energy.faults(row_of(energy, in_bfloat16, 4, "bfloat16")))
    assert all(f"{way} keeps" in faults for way in WAYS)
    for words in ("ranks differ at", "in blocks has other bits", "same seed gave another plan"):
        assert words in faults


def test_a_new_row_takes_the_place_of_the_old_one(energy):
    def row(model, place):
        return {"model": model, "rank": 8, "device": "cpu", "dtype": "float32", "place": place}

    result = {"places": ["old", "new"], "rows": [row("a", 0), row("b", 0)]}
    energy.merge(result, [row("a", 1), row("c", 1)])
    assert [(each["model"], each["place"]) for each in result["rows"]] == [
        ("a", 1),
        ("b", 0),
        ("c", 1),
    ]
    energy.merge(result, [row("b", 1)])
    assert result["places"] == ["new"]
    assert {each["place"] for each in result["rows"]} == {0}


def test_the_committed_rows_break_no_threshold(energy):
    rows = json.loads((Path(energy.__file__).with_name("energy.json")).read_text())["rows"]
    assert [fault for row in rows for fault in energy.faults(row)] == []
