"""The streaming second moment against its definition, written out in numpy loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tlora.linalg import packed
from tlora.linalg.moments import SecondMoment
from tlora.linalg.packed import packed_numbers

DIM = 5
LENGTHS = (4, 1, 7, 3)


def make_samples(seed: int = 0) -> list[torch.Tensor]:
    """Samples whose means differ and are far from zero, so that the centering matters."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, DIM, generator=generator) + 3 * torch.randn(DIM, generator=generator)
        for length in LENGTHS
    ]


def definition(samples: list[torch.Tensor], center: bool = True) -> np.ndarray:
    total = np.zeros((samples[0].shape[1],) * 2)
    for sample in samples:
        rows = sample.double().numpy()
        mean = sum(rows) / len(rows) if center and len(rows) else 0.0
        for row in rows:
            total += np.outer(row - mean, row - mean)
    return total / len(samples)


def padded(
    samples: list[torch.Tensor], layout: str, fill: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples as one batch of 9 slots, and its mask."""
    slots = 9
    inputs = torch.full((len(samples), slots, samples[0].shape[1]), fill)
    mask = torch.zeros(len(samples), slots, dtype=torch.bool)
    for row, sample in enumerate(samples):
        places = {
            "right": torch.arange(len(sample)),
            "left": torch.arange(slots - len(sample), slots),
            "holes": torch.arange(len(sample)) * slots // max(len(sample), 1),
        }[layout]
        inputs[row, places] = sample
        mask[row, places] = True
    return inputs, mask


def one_at_a_time(samples: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> SecondMoment:
    moment = SecondMoment(DIM, dtype)
    for sample in samples:
        moment.update(sample[None])
    return moment


def assert_close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = np.abs(expected).max() or 1.0
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=tolerance * scale)


def test_samples_one_at_a_time_give_the_definition() -> None:
    samples = make_samples()
    moment = one_at_a_time(samples)
    assert_close(moment.covariance(), definition(samples))
    assert_close(moment.uncentered(), definition(samples, center=False))
    assert (moment.samples, moment.tokens) == (len(LENGTHS), sum(LENGTHS))


@pytest.mark.parametrize("fill", [0.0, 100.0, math.nan, math.inf])
@pytest.mark.parametrize("layout", ["left", "right", "holes"])
def test_a_padded_batch_gives_the_definition(layout: str, fill: float) -> None:
    samples = make_samples()
    moment = SecondMoment(DIM)
    moment.update(*padded(samples, layout, fill))
    assert_close(moment.covariance(), definition(samples))
    assert_close(moment.uncentered(), definition(samples, center=False))
    assert (moment.samples, moment.tokens) == (len(LENGTHS), sum(LENGTHS))


@pytest.mark.parametrize("layout", ["left", "right", "holes"])
def test_a_padded_batch_holds_the_mean_rows_of_its_samples(layout: str) -> None:
    samples = make_samples()
    moment = SecondMoment(DIM)
    moment.update(*padded(samples, layout, math.nan))
    expected = np.stack([x.double().sum(0).numpy() / math.sqrt(len(x)) for x in samples])
    assert_close(moment.weighted_means, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_mask_may_have_any_dtype(dtype: torch.dtype) -> None:
    samples = make_samples()
    inputs, mask = padded(samples, "left", math.nan)
    moment = SecondMoment(DIM)
    moment.update(inputs, mask.to(dtype))
    assert_close(moment.covariance(), definition(samples))
    assert moment.tokens == sum(LENGTHS)


def test_an_all_true_mask_equals_no_mask() -> None:
    inputs = torch.stack([sample[:3] for sample in make_samples() if len(sample) >= 3])
    masked, plain = SecondMoment(DIM), SecondMoment(DIM)
    masked.update(inputs, torch.ones(inputs.shape[:2]))
    plain.update(inputs)
    assert_close(masked.covariance(), plain.covariance().double().numpy())
    assert (masked.samples, masked.tokens) == (plain.samples, plain.tokens)


def test_each_sample_is_centered_on_its_own_mean() -> None:
    # Constant samples at different places: global centering, or none, leaves a moment.
    samples = [torch.full((3, DIM), value) for value in (1.0, -2.0, 5.0)]
    moment = one_at_a_time(samples)
    assert_close(moment.covariance(), np.zeros((DIM, DIM)))
    assert_close(moment.uncentered(), np.full((DIM, DIM), 3 * (1 + 4 + 25) / 3))


def test_the_moment_is_not_divided_by_the_tokens() -> None:
    samples = make_samples()
    once = one_at_a_time(samples).covariance()
    twice = one_at_a_time([torch.cat([x, x]) for x in samples]).covariance()
    assert_close(twice, 2 * once.double().numpy())


def test_the_moment_is_divided_by_the_samples() -> None:
    samples = make_samples()
    once = one_at_a_time(samples).covariance()
    assert_close(one_at_a_time([*samples, *samples]).covariance(), once.double().numpy())


def test_covariance_is_symmetric_and_positive_semidefinite() -> None:
    covariance = one_at_a_time(make_samples()).covariance()
    assert torch.equal(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance.double()).min() >= -1e-5


def test_a_sample_of_one_token_has_no_centered_moment() -> None:
    sample = make_samples()[1]
    moment = one_at_a_time([sample])
    assert_close(moment.covariance(), np.zeros((DIM, DIM)))
    assert_close(moment.uncentered(), np.outer(sample[0], sample[0]))


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_a_sample_without_tokens_counts_as_a_sample(fill: float) -> None:
    samples = [*make_samples(), torch.zeros(0, DIM)]
    moment = SecondMoment(DIM)
    moment.update(*padded(samples, "right", fill))
    assert_close(moment.covariance(), definition(samples))
    assert_close(moment.uncentered(), definition(samples, center=False))
    assert (moment.samples, moment.tokens) == (len(samples), sum(LENGTHS))


def test_an_update_of_zero_slots_counts_its_samples() -> None:
    moment = SecondMoment(DIM)
    moment.update(torch.zeros(2, 0, DIM))
    assert (moment.samples, moment.tokens) == (2, 0)
    assert torch.equal(moment.covariance(), torch.zeros(DIM, DIM))
    assert torch.equal(moment.uncentered(), torch.zeros(DIM, DIM))


def test_an_empty_accumulator_is_zero_and_finite() -> None:
    moment = SecondMoment(DIM)
    assert torch.equal(moment.covariance(), torch.zeros(DIM, DIM))
    assert torch.equal(moment.uncentered(), torch.zeros(DIM, DIM))
    assert moment.weighted_means.shape == (0, DIM)


def test_a_far_mean_does_not_cancel_the_moment() -> None:
    # E[x^2] - E[x]^2 in float32 would lose everything here.
    samples = [x + 3000 for x in make_samples()]
    assert_close(one_at_a_time(samples).covariance(), definition(samples), 1e-3)


def test_float64_accumulates_in_float64() -> None:
    samples = [x.double() / 3 for x in make_samples()]
    moment = one_at_a_time(samples, torch.float64)
    assert moment.covariance().dtype == torch.float64
    assert_close(moment.covariance(), definition(samples), 1e-13)
    assert_close(moment.uncentered(), definition(samples, center=False), 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    samples = [x.to(dtype) for x in make_samples()] * 20
    moment = one_at_a_time(samples)
    assert moment.covariance().dtype == torch.float32
    assert_close(moment.covariance(), definition(samples))
    assert_close(moment.uncentered(), definition(samples, center=False))


def test_inputs_are_left_alone_and_out_of_the_graph() -> None:
    inputs = torch.stack([x[:3] for x in make_samples() if len(x) >= 3])
    kept = inputs.clone()
    moment = SecondMoment(DIM)
    moment.update(inputs.requires_grad_(), torch.ones(inputs.shape[:2]))
    assert torch.equal(inputs, kept)
    assert not moment.covariance().requires_grad
    assert not moment.weighted_means.requires_grad


@pytest.mark.parametrize("wide", [False, True])
def test_the_parts_rebuild_the_accumulator(wide: bool) -> None:
    samples = make_samples()
    moment = one_at_a_time(samples[:2])
    assert set(moment.parts()) == {"means", "rows"}  # 5 tokens of 5 columns
    if wide:
        assert len(moment.scatter.numbers) == packed_numbers(DIM)
        assert set(moment.parts()) == {"means", "scatter"}
    rebuilt = SecondMoment.from_parts(moment.parts(), moment.samples, moment.tokens)
    rebuilt.update(samples[2][None])
    assert_close(rebuilt.covariance(), definition(samples[:3]))
    assert_close(rebuilt.uncentered(), definition(samples[:3], center=False))
    assert (rebuilt.samples, rebuilt.tokens) == (3, sum(LENGTHS[:3]))


# --- few tokens: rows instead of C


WIDE = 40  # columns; LENGTHS are 15 tokens


def wide_samples(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDE, generator=generator) + 2 for length in LENGTHS]


def gathered(samples: list[torch.Tensor]) -> SecondMoment:
    moment = SecondMoment(WIDE)
    for sample in samples:
        moment.update(sample[None])
    return moment


def test_c_is_not_formed_while_tokens_are_no_more_than_columns() -> None:
    samples = wide_samples()
    moment = gathered(samples)
    assert moment.rows is not None
    assert moment.rows.shape == (sum(LENGTHS), WIDE)
    weight = torch.randn(7, WIDE)
    product = moment.weighted(weight)
    assert moment.rows is not None  # nor is it by asking for W C or for C
    assert product.right is not None
    assert_close(moment.covariance(), definition(samples))
    assert_close(moment.uncentered(), definition(samples, center=False))
    assert moment.rows is not None
    assert_close(product.dense(), weight.double().numpy() @ definition(samples))


def test_rows_turn_into_c_when_they_outgrow_it_and_nothing_is_lost() -> None:
    samples = wide_samples() + wide_samples(1) + wide_samples(2)
    moment = SecondMoment(WIDE)
    formed = []
    for sample in samples:
        moment.update(sample[None])
        formed.append(moment.rows is None)
    assert formed == [sum(map(len, samples[: i + 1])) > WIDE for i in range(len(samples))]
    assert_close(moment.covariance(), definition(samples))
    assert_close(moment.uncentered(), definition(samples, center=False))
    weight = torch.randn(7, WIDE)
    assert_close(moment.weighted(weight).dense(), weight.double().numpy() @ definition(samples))


def test_rows_are_kept_while_they_take_no_more_room_than_c() -> None:
    moment = SecondMoment(600)
    most = packed_numbers(600) // 600
    assert 300 < most < 600
    moment.update(torch.randn(1, most, 600))
    assert moment.rows is not None
    moment.update(torch.randn(1, 1, 600))
    assert moment.rows is None


@pytest.mark.parametrize("count", [2, 4, 7, 12])
def test_space_that_is_given_holds_rows_and_then_c_the_same_to_the_bit(count: int) -> None:
    samples = [*wide_samples(), *wide_samples(1), *wide_samples(2)][:count]
    space = torch.zeros(packed_numbers(WIDE))
    given, own = SecondMoment(WIDE, space=space), SecondMoment(WIDE)
    for sample in samples:
        given.update(sample[None])
        own.update(sample[None])
    assert given.parts().keys() == own.parts().keys()
    for name, part in own.parts().items():
        assert torch.equal(given.parts()[name], part)
        if name != "means":
            assert given.parts()[name].data_ptr() == space.data_ptr()
    weight = torch.randn(7, WIDE)
    assert torch.equal(given.weighted(weight).dense(), own.weighted(weight).dense())
    assert torch.equal(given.covariance(), own.covariance())
    assert torch.equal(given.scatter.numbers, own.scatter.numbers)
    into = torch.zeros(packed_numbers(WIDE))
    copy = SecondMoment(WIDE, space=into)
    copy.take(given.parts(), given.samples, given.tokens)
    assert torch.equal(copy.scatter.numbers, own.scatter.numbers)
    assert copy.scatter.numbers.data_ptr() == into.data_ptr()


# --- 16-bit products, as on an accelerator


def offset(spread: float) -> torch.Tensor:
    """Tokens of unit variance but for one feature, which lies at 1e4 and moves by ``spread``."""
    rows = torch.randn(1, 200, 300, generator=torch.Generator().manual_seed(0))
    rows[..., 7] = 1e4 + spread * rows[..., 7]
    return rows.bfloat16()


def outlier() -> torch.Tensor:
    """Tokens of unit variance, and one massive activation of 1e4."""
    rows = torch.randn(1, 200, 300, generator=torch.Generator().manual_seed(1))
    rows[0, 0, 7] = 1e4
    return rows.bfloat16()


@pytest.mark.parametrize("inputs", [outlier(), offset(1.0), offset(1e3)])
def test_two_terms_of_centered_rows_hold_the_moment(
    inputs: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tlora.linalg.packed.multiplies_narrow", lambda device: True)
    moment = SecondMoment(300)
    moment.update(inputs)
    centered = inputs[0].double() - inputs[0].double().mean(dim=0)
    exact = centered.T @ centered
    found = moment.covariance().double()
    # Relative to each pair of features, so that the massive one hides nothing.
    size = exact.diagonal().sqrt()
    assert ((found - exact).abs() <= 2e-5 * size[:, None] * size + 1e-12).all()


def test_float64_moments_of_16_bit_inputs_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlora.linalg.packed.multiplies_narrow", lambda device: True)
    inputs, moment = outlier().repeat(1, 2, 1), SecondMoment(300, torch.float64)
    moment.update(inputs)  # too many tokens to be kept as rows
    centered = inputs[0].double() - inputs[0].double().mean(dim=0)
    torch.testing.assert_close(moment.covariance(), centered.T @ centered, rtol=1e-12, atol=1e-9)


def test_rows_that_were_kept_are_multiplied_in_16_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlora.linalg.packed.multiplies_narrow", lambda device: True)
    products: list[int] = []
    add = packed.PackedTriangle._add_narrow
    monkeypatch.setattr(
        packed.PackedTriangle,
        "_add_narrow",
        lambda self, parts: (products.append(len(parts[0])), add(self, parts)),
    )
    moment = SecondMoment(300)
    for _ in range(2):
        moment.update(outlier()[:, :150])  # one batch is kept, the second forms the moment
    assert products == [150, 150]
    float32 = SecondMoment(300)
    float32.update(outlier()[:, :150].float())
    float32.update(outlier()[:, :150])
    assert products == [150, 150, 150]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [20, 400])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_16_bit_weight_gives_the_float32_product(
    dtype: torch.dtype, tokens: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("packed", "moments"):
        monkeypatch.setattr(f"tlora.linalg.{module}.multiplies_narrow", lambda device: narrow)
    moment = SecondMoment(300)
    moment.update(torch.randn(1, tokens, 300))
    weight = torch.randn(7, 300).to(dtype)
    product = moment.weighted(weight).dense()
    exact = weight.double() @ moment.covariance().double()
    assert product.dtype == torch.float32
    assert (product.double() - exact).norm() <= 1e-6 * exact.norm()
