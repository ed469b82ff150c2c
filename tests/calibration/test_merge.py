"""Merged calibrations against one calibration over all samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import Tensor, nn

import support
from support import Toy, toy_batch, toy_samples
from tlora import Calibration, TLoraConfig, calibrate
from tlora.calibration.statistics import merge
from tlora.errors import CalibrationError


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2, "lora_alpha": 2} | fields))


def sharing(stats: Calibration) -> set[frozenset[str]]:
    """Who shares a moment with whom, by the moments themselves."""
    groups: dict[int, set[str]] = {}
    for name, module in stats.modules.items():
        groups.setdefault(id(module.moment), set()).add(name)
    return set(map(frozenset, groups.values()))


def assert_equal_but_for_rounding(left: Calibration, right: Calibration) -> None:
    assert list(left.modules) == list(right.modules)
    assert (left.samples, left.key, left.info) == (right.samples, right.key, right.info)
    assert sharing(left) == sharing(right)
    for name, module in left.modules.items():
        other = right.modules[name]
        assert (module.samples, module.tokens) == (other.samples, other.tokens)
        assert module.sensitivity == pytest.approx(other.sensitivity, rel=1e-5)
        assert support.distance(module.covariance(), other.covariance()) < 1e-5
        assert support.distance(module.uncentered(), other.uncentered()) < 1e-5


@pytest.mark.parametrize("name", ["llama-right", "bert", "t5"])
@pytest.mark.parametrize("cuts", [[1], [3], [1, 2, 4]])
def test_parts_give_what_one_run_over_all_gives(family_of, name, cuts):
    family = family_of(name)
    ends = [0, *cuts, 5]
    batches = [
        [support.padded(family.samples[i : i + 1], family.side) for i in range(low, high)]
        for low, high in itertools.pairwise(ends)
    ]
    whole = calibrate(family.model, list(itertools.chain(*batches)), config(**family.config))
    parts = [calibrate(family.model, part, config(**family.config)) for part in batches]

    assert_equal_but_for_rounding(merge(parts), whole)
    if len(parts) == 2:
        assert_equal_but_for_rounding(parts[0] + parts[1], whole)


def test_the_parts_stay_as_they_were(family_of, tmp_path):
    family = family_of("llama-right")
    parts = [calibrate(family.model, family.batches(5), config()) for _ in range(2)]
    before = [part.save(tmp_path / f"{i}.safetensors").read_bytes() for i, part in enumerate(parts)]
    merge(parts)
    after = [part.save(tmp_path / f"{i}.safetensors").read_bytes() for i, part in enumerate(parts)]
    assert before == after


class Forked(Toy):
    """Three modules; the input says which of them read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8)

    def encode(self, x: Tensor, apart: int = 0, **_: Any) -> Tensor:
        inputs = [x, x, x]
        if apart:
            inputs[apart] = 2 * x.roll(1, dims=-1)
        parts = (self.first, self.second, self.third)
        return sum(part(each) for part, each in zip(parts, inputs, strict=True))


class ForkedForSequenceClassification(Forked):
    """Its loss is a mean over samples."""


def test_groups_that_differ_are_refined():
    model, samples = support.seeded(ForkedForSequenceClassification), toy_samples()
    fields = config(exclude_modules=["head"])
    halves = [
        [toy_batch(samples[:2]) | {"apart": 1}],
        [toy_batch(samples[2:]) | {"apart": 2}],
    ]
    first, second = (calibrate(model, half, fields) for half in halves)
    assert sharing(first) == {frozenset({"first", "third"}), frozenset({"second"})}
    assert sharing(second) == {frozenset({"first", "second"}), frozenset({"third"})}

    total = first + second

    assert len(sharing(total)) == 3
    assert_equal_but_for_rounding(total, calibrate(model, [*halves[0], *halves[1]], fields))


@pytest.mark.parametrize(
    "fields", [{"basis": "random"}, {"allocate_rank": False, "allocate_scale": False}]
)
def test_what_was_not_measured_stays_so(family_of, fields):
    family = family_of("llama-right")
    stats = calibrate(family.model, family.samples, config(**fields))
    for module in (stats + stats).modules.values():
        assert (module.moment is None) == ("basis" in fields)
        assert (module.sensitivity is None) == ("basis" not in fields)


def test_planning_alone_does_not_keep_parts_from_merging(family_of):
    family = family_of("llama-right")
    parts = [calibrate(family.model, family.samples, config(r=r, seed=r)) for r in (2, 3)]
    assert merge(parts).samples == 10


def test_another_model_is_refused(tiny_llama, family_of):
    family = family_of("llama-right")
    other = tiny_llama(initializer_range=0.1)
    parts = [calibrate(m, family.samples, config()) for m in (family.model, other)]
    with pytest.raises(CalibrationError, match=r"calibration 1 .*different models .*merge"):
        merge(parts)


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj"]}, {"basis": "random"}, {"exclude_modules": ["q_proj"]}]
)
@pytest.mark.parametrize("known", [True, False])
def test_another_configuration_is_refused(family_of, fields, known):
    family = family_of("llama-right")
    parts = [calibrate(family.model, family.samples, c) for c in (config(), config(**fields))]
    for part in parts:
        part.key = part.key if known else None
    with pytest.raises(CalibrationError, match="different configurations"):
        merge(parts)


def test_nothing_is_not_merged():
    with pytest.raises(CalibrationError, match="no calibrations to merge"):
        merge([])


def test_bad_samples_are_counted_through(family_of):
    family = family_of("llama-right")
    family.samples[3]["labels"][:] = -100
    with pytest.warns(UserWarning, match="left out"):
        second = calibrate(family.model, family.samples[2:], config(), skip_bad_samples=True)
    first = calibrate(family.model, family.samples[:2], config())
    with pytest.warns(UserWarning, match="left out"):
        whole = calibrate(family.model, family.samples, config(), skip_bad_samples=True)
    assert whole.info["skipped_samples"] == {"3": "it has no label that counts"}
    assert_equal_but_for_rounding(first + second, whole)


def test_what_is_no_calibration_does_not_add(tiny_llama):
    stats = Calibration({}, 0)
    with pytest.raises(TypeError):
        stats + 1
