"""Samples that cannot count: named, or left out as if they had not been given."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import support
from support import Sample, Toy, toy_batch, toy_samples
from tlora import Calibration, TLoraConfig, calibrate
from tlora.adapter.blocks import plan_in_blocks
from tlora.errors import CalibrationError


def config(**fields: Any) -> TLoraConfig:
    return TLoraConfig(**({"r": 2, "lora_alpha": 2} | fields))


class SteepForSequenceClassification(Toy):
    """Marks in a sample's first numbers break its input, its loss or its gradient."""

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        marks = x[:, :1, :1]
        hidden = self.first(torch.where(marks == 7, torch.nan, x))
        # At 8: sqrt(0), a finite value of infinite slope; at 9: 0 / 0 behind every target.
        steep = torch.where(marks == 8, 0 * hidden, hidden.square() + 1).sqrt()
        return steep + torch.where(marks == 9, torch.nan, 0.0)


INPUT, GRADIENT, LOSS = 7.0, 8.0, 9.0
FIELDS: dict[str, Any] = {"target_modules": ["first"]}


def marked(bad: dict[int, float], count: int = 6) -> list[Sample]:
    samples = toy_samples([3] * count)
    for number, mark in bad.items():
        samples[number]["inputs_embeds"][0, 0, 0] = mark
    return samples


def batched(samples: Sequence[Sample], size: int, without: Sequence[int] = ()) -> list[Sample]:
    """Join samples by ``size``; those in ``without`` are then missing from their batches."""
    batches = []
    for start in range(0, len(samples), size):
        kept = [s for i, s in enumerate(samples[start : start + size], start) if i not in without]
        batches += [toy_batch(kept)] if kept else []
    return batches


def assert_same(left: Calibration, right: Calibration) -> None:
    assert list(left.modules) == list(right.modules)
    for name, module in left.modules.items():
        other = right.modules[name]
        assert module.sensitivity == other.sensitivity, name
        assert (module.samples, module.tokens) == (other.samples, other.tokens)
        assert torch.equal(module.covariance(), other.covariance()), name
        assert torch.equal(module.uncentered(), other.uncentered()), name


MESSAGES = {
    INPUT: r"first: its input is not finite on sample 4 \(counted from 0\)",
    GRADIENT: r"first: the gradient of the loss is not finite on sample 4 \(counted from 0\)",
    LOSS: r"the loss of sample 4 \(counted from 0\) is nan",
}


@pytest.mark.parametrize("mark", MESSAGES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_bad_sample_is_named(mark, size):
    model = support.seeded(SteepForSequenceClassification)
    with pytest.raises(CalibrationError, match=MESSAGES[mark]):
        calibrate(model, batched(marked({4: mark}), size), config(**FIELDS))


@pytest.mark.parametrize(
    "bad",
    [{4: INPUT}, {0: GRADIENT}, {5: LOSS}, {1: LOSS, 2: GRADIENT, 3: INPUT}, {2: LOSS, 3: LOSS}],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3])
def test_left_out_is_as_if_not_given_to_the_bit(bad, size):
    model = support.seeded(SteepForSequenceClassification)
    samples = marked(bad)
    with pytest.warns(UserWarning, match=f"^{len(bad)} of 6 calibration samples") as caught:
        stats = calibrate(model, batched(samples, size), config(**FIELDS), skip_bad_samples=True)
    expected = calibrate(model, batched(samples, size, without=list(bad)), config(**FIELDS))

    assert_same(stats, expected)
    assert stats.samples == 6 - len(bad)
    assert stats.info["skipped"] == len(bad)
    assert sorted(map(int, stats.info["skipped_samples"])) == sorted(bad)
    [message] = [str(w.message) for w in caught]
    assert all(f"{number} (" in message for number in bad)
    assert (expected.info["skipped"], expected.info["skipped_samples"]) == (0, {})


@pytest.mark.parametrize(("name", "size"), [("llama-right", 1), ("llama-left", 2), ("t5", 5)])
def test_samples_without_a_label_are_left_out(family_of, name, size):
    family = family_of(name)
    family.samples[3]["labels"][:] = -100
    with pytest.warns(UserWarning, match=r"1 of 5 .*: 3 \(it has no label that counts\)"):
        stats = calibrate(
            family.model, family.batches(size), config(**family.config), skip_bad_samples=True
        )
    good = [sample for number, sample in enumerate(family.samples) if number != 3]
    support.assert_agrees(
        stats, support.one_at_a_time(family.model, good, stats.modules), tolerance=1e-4
    )


def test_where_no_backward_is_run_labels_do_not_matter(family_of):
    family = family_of("llama-right")
    family.samples[3]["labels"][:] = -100
    fields = config(allocate_rank=False, allocate_scale=False)
    stats = calibrate(family.model, family.batches(2), fields, skip_bad_samples=True)
    assert (stats.samples, stats.info["skipped"]) == (5, 0)


class SummedSteep(SteepForSequenceClassification):
    """A loss that is a sum, so that its samples are run one at a time."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


SummedSteep.__name__ = "SummedLoss"


def test_samples_that_are_run_one_at_a_time_are_left_out_too():
    model = support.seeded(SummedSteep)
    samples = marked({1: LOSS, 2: GRADIENT, 4: INPUT})
    with pytest.warns(UserWarning, match="3 of 6"):
        stats = calibrate(model, batched(samples, 3), config(**FIELDS), skip_bad_samples=True)
    assert_same(stats, calibrate(model, batched(samples, 3, without=[1, 2, 4]), config(**FIELDS)))


def test_samples_whose_losses_overflow_only_together_count():
    class Overflowing(Toy):
        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            return losses.mean() if len(losses) == 1 else losses.mean() * torch.inf

    class OverflowingForSequenceClassification(Overflowing):
        pass

    model, samples = support.seeded(OverflowingForSequenceClassification), marked({})
    together = calibrate(model, batched(samples, 3), config(**FIELDS))
    assert_same(together, calibrate(model, batched(samples, 1), config(**FIELDS)))


def test_no_good_sample_is_an_error():
    model = support.seeded(SteepForSequenceClassification)
    samples = marked({0: LOSS, 1: INPUT, 2: GRADIENT}, count=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CalibrationError, match=r"all 3 calibration samples are bad: .*1 \(the"):
            calibrate(model, batched(samples, 2), config(**FIELDS), skip_bad_samples=True)


def test_many_are_counted_and_ten_are_named():
    model = support.seeded(SteepForSequenceClassification)
    samples = marked(dict.fromkeys(range(12), LOSS), count=13)
    with pytest.warns(UserWarning, match=r"^12 of 13 .*, 9 \(.*\) and 2 more\.$"):
        calibrate(model, batched(samples, 4), config(**FIELDS), skip_bad_samples=True)


@pytest.mark.parametrize("budget", [None, 1])
def test_planning_in_blocks_leaves_the_same_samples_out(budget):
    model = support.seeded(SteepForSequenceClassification)
    samples = marked({1: LOSS, 2: GRADIENT, 3: INPUT})
    fields = config(memory_budget=budget, covariance="exact", target_modules=["first", "head"])
    # The head's own input is not finite where the loss is not.
    with pytest.warns(UserWarning, match="^3 of 6"):
        found = plan_in_blocks(model, batched(samples, 2), fields, skip_bad_samples=True)
    expected = plan_in_blocks(model, batched(samples, 2, without=[1, 2, 3]), fields)
    for name, module in found.modules.items():
        assert torch.equal(module.lora_A, expected.modules[name].lora_A)
        assert (module.rank, module.scale) == (
            expected.modules[name].rank,
            expected.modules[name].scale,
        )
    assert (found.info["samples"], found.info["skipped"]) == (3, 3)
    with pytest.raises(CalibrationError, match="sample 1"):
        plan_in_blocks(model, batched(samples, 2), fields)
