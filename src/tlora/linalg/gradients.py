"""Statistics of weight gradients from pairs (delta, x); no sample's gradient is stored whole.

With G_s = dL_s/dW = delta_s^T X_s: sum |W * G_s| (arXiv 2604.18124, section 3; docs/method.md, 2)
or sum G_s^2 of each sample, and a batch's contribution to the mean gradient (LoRA-GA, arXiv
2407.05000, section 3.2; used here only for the directions of a frozen A) and to the
gradient-weighted moment (docs/method.md, 9).
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tlora.linalg.matrices import full_precision
from tlora.linalg.products import NARROW, factors, multiplies_narrow, product

logger = logging.getLogger(__name__)

# Entries of G formed at once. On a CPU, four megabytes stay in its cache; on an accelerator, the G
# of all samples of a batch stay in the L2 cache.
_CPU_ENTRIES = 2**20

_DEVICE_ENTRIES = 2**23

Pairs = Sequence[tuple[Tensor, Tensor]]
"""(delta, x) of each call of the module on one sample: T x m and T x d (`products.factors`)."""


@dataclass(frozen=True)
class Rows:
    """The rows of all samples of a batch, concatenated.

    G_s is a sum over tokens of all calls, so the rows of all calls are joined.

    Attributes:
        delta: tokens x m.
        x: tokens x d.
        counts: tokens of each sample.
    """

    delta: Tensor
    x: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Pairs]) -> Rows:
        """Join the pairs of each sample; at least one sample must have a pair."""
        deltas, inputs = zip(*(pair for pairs in samples for pair in pairs), strict=True)
        counts = tuple(sum(len(delta) for delta, _ in pairs) for pairs in samples)
        return cls(*factors(_joined(deltas), _joined(inputs)), counts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts; a view where they are contiguous in memory."""
    first = parts[0]
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        follows = part.data_ptr() == place and part.untyped_storage().data_ptr() == storage
        if not (follows and part.is_contiguous() and part.dtype == first.dtype):
            return torch.cat(list(parts))
        place += part.numel() * part.itemsize
    return first.as_strided((sum(map(len, parts)), first.shape[1]), (first.shape[1], 1))


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a read-only tensor; cached because copies to a GPU synchronize."""
    return torch.tensor(values, dtype=dtype, device=device)


@full_precision
def weighted_magnitude(weight: Tensor, samples: Sequence[Pairs]) -> Tensor:
    """Return sum_jk |W_jk| |G_s,jk| of each sample, with G_s = sum over its pairs of delta^T x.

    Neither |W| nor any G_s is formed whole.

    Args:
        weight: W, m x d of any floating dtype.
        samples: the pairs of each sample.

    Returns:
        A value per sample, float32 on the device of ``weight``; 0 without pairs.
    """
    if _is_cpu(weight.device):
        return _in_cache(weight, samples)
    if not any(samples):
        return torch.zeros(len(samples), device=weight.device)
    rows = Rows.of(samples)
    fused = _fuses(weight.device, rows.delta.dtype, weight.dtype)
    return fused_magnitude(weight, rows) if fused else batched_magnitude(weight, rows)


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _in_cache(weight: Tensor, samples: Sequence[Pairs]) -> Tensor:
    """Process W in blocks of rows, all samples per block."""
    rows, columns = weight.shape
    step = max(1, _CPU_ENTRIES // columns)
    totals = torch.zeros(len(samples))
    buffer = torch.empty(min(step, rows), columns)
    each = [[factors(delta, x) for delta, x in pairs] for pairs in samples]
    for start in range(0, rows, step):
        # `contiguous` handles a transposed view; `abs` copies the block in either case.
        block = weight[start : start + step].abs().float().contiguous().flatten()
        gradient = buffer[: len(block) // columns]
        for total, pairs in zip(totals, each, strict=True):
            for index, (delta, x) in enumerate(pairs):
                part = delta[:, start : start + step].T
                torch.addmm(gradient, part, x, beta=float(index > 0), out=gradient)
            if pairs:
                # |W| . |G| as an inner product reads the block once; |W G| would take three passes.
                total.add_(torch.dot(gradient.abs_().flatten(), block))
    return totals


def batched_magnitude(weight: Tensor, rows: Rows) -> Tensor:
    """Return `weighted_magnitude` by a few large products, block by block."""
    size, columns = len(rows.counts), weight.shape[1]
    step = max(1, _DEVICE_ENTRIES // (size * columns))
    totals = torch.zeros(size, device=weight.device)
    inputs = _by_sample(rows.x, rows.counts)
    for start in range(0, len(weight), step):
        block = weight[start : start + step].abs().float()
        deltas = _by_sample(rows.delta[:, start : start + step], rows.counts)
        if isinstance(deltas, Tensor) and isinstance(inputs, Tensor):
            gradients = product(deltas.mT, inputs)
        else:
            gradients = torch.stack(
                [product(delta.T, x) for delta, x in zip(deltas, inputs, strict=True)]
            )
        # One product per row of W: a single product for all would give each sample one thread
        # block.
        totals += torch.bmm(gradients.abs_().transpose(0, 1), block[:, :, None]).sum(dim=(0, 2))
    return totals


def _by_sample(rows: Tensor, counts: tuple[int, ...]) -> Tensor | Sequence[Tensor]:
    """Return B x T x columns if all samples have equal length, else the rows of each."""
    if len(set(counts)) == 1:
        same: Tensor = rows.unflatten(0, (len(counts), counts[0]))
        return same
    return torch.split(rows, list(counts))


def fused_magnitude(weight: Tensor, rows: Rows) -> Tensor:
    """Return `weighted_magnitude` by one kernel, deterministic to the bit on one kind of device."""
    from tlora.linalg.kernels import weighted_magnitudes

    offsets = tuple(itertools.accumulate(rows.counts, initial=0))
    places = constant(offsets, torch.int32, weight.device)
    return weighted_magnitudes(weight, rows.delta, rows.x, places)


@functools.cache
def _fuses(device: torch.device, rows: torch.dtype, weight: torch.dtype) -> bool:
    """Return whether `fused_magnitude` works and pays off; checked once per process.

    It must first reproduce `batched_magnitude` on a small example.

    Raises:
        OutOfMemoryError: the device has no memory left for the example.
    """
    if rows not in NARROW or not multiplies_narrow(device):
        return False
    try:
        _check(device, rows, weight)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton or its compiler may raise anything.
        logger.warning(
            "The fused sensitivity kernel does not run on %s (%s: %s); using the slower "
            "unfused computation.",
            *(device, type(error).__name__, error),
        )
        return False
    return True


def _check(device: torch.device, rows: torch.dtype, weight: torch.dtype) -> None:
    """Check `fused_magnitude` against `batched_magnitude`.

    Raises:
        ArithmeticError: they differ.
    """

    def example(height: int, width: int) -> Tensor:
        # No random numbers here: they would advance the user's generator.
        return torch.arange(height * width, device=device).square().sin().view(height, width)

    given = Rows(example(96, 144).to(rows), example(96, 272).to(rows), (64, 0, 32))
    matrix = example(144, 272).to(weight)
    found, expected = fused_magnitude(matrix, given), batched_magnitude(matrix, given)
    if not torch.allclose(found, expected, rtol=1e-4, atol=0):
        raise ArithmeticError(f"the kernel gives {found.tolist()} instead of {expected.tolist()}")


@full_precision
def squared_norm(samples: Sequence[Pairs]) -> Tensor:
    """Return ||G_s||_F^2 of each sample, with G_s = sum over its pairs of delta^T x.

    For few tokens, from two T x T Gram matrices over the tokens of all pairs: ||delta^T x||_F^2 =
    sum_tu (delta delta^T)_tu (x x^T)_tu; otherwise in blocks of rows.

    Args:
        samples: the pairs of each sample; at least one sample must have a pair.

    Returns:
        A value per sample, float32 on the device of the pairs; 0 without pairs.
    """
    like = next(delta for pairs in samples for delta, _ in pairs)
    totals = like.new_zeros(len(samples), dtype=torch.float32)
    for total, pairs in zip(totals, samples, strict=True):
        if pairs:
            rows = Rows.of([pairs])
            total.copy_(_squared_norm(rows.delta, rows.x))
    return totals


def _squared_norm(delta: Tensor, x: Tensor) -> Tensor:
    tokens, rows, columns = len(delta), delta.shape[1], x.shape[1]
    if tokens * (rows + columns) <= rows * columns:
        return product(delta, delta.T).mul_(product(x, x.T)).sum().clamp_min(0)
    entries = _CPU_ENTRIES if _is_cpu(delta.device) else _DEVICE_ENTRIES
    blocks = delta.split(max(1, entries // columns), dim=1)
    return torch.stack([product(block.T, x).square().sum() for block in blocks]).sum()


@full_precision
def add_gradient(total: Tensor, samples: Sequence[Pairs], weights: Sequence[float]) -> None:
    """Add sum_s w_s delta_s^T X_s, the gradients of the samples' own losses, to ``total``.

    Args:
        total: m x d float32, changed in place; on the device of the rows.
        samples: the pairs of each sample.
        weights: w; each turns the gradient of the batch's loss into that of the sample's own.
    """
    if not any(delta.dtype in NARROW for pairs in samples for delta, _ in pairs):
        delta, x = _weighted_rows(samples, weights)
        total.addmm_(delta.T, x)
        return
    # 16 bits cannot hold w delta, so the product of all samples with one weight is scaled instead.
    for weight in dict.fromkeys(weights):
        own = [pairs for pairs, w in zip(samples, weights, strict=True) if w == weight and pairs]
        if own:
            rows = Rows.of(own)
            total.add_(product(rows.delta.T, rows.x), alpha=weight)


def gradient_weighted(samples: Sequence[Pairs], weights: Sequence[float]) -> Tensor:
    """Return the rows ||w delta_t|| x_t, so that X'^T X' = sum_t ||w delta_t||^2 x_t x_t^T.

    That is the sum of g^T g over the tokens' own gradients g = w delta_t x_t^T (m x d): the weight
    gradient that each token alone would give.

    Args:
        samples: the pairs of each sample; at least one sample must have a pair.
        weights: w, see `add_gradient`.

    Returns:
        tokens x d, float32.
    """
    delta, x = _weighted_rows(samples, weights)
    norms: Tensor = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
    return norms * x


def _weighted_rows(samples: Sequence[Pairs], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return w delta and X of all samples in float32."""
    each = [
        (weight * delta.float(), x.float())
        for weight, pairs in zip(weights, samples, strict=True)
        for delta, x in pairs
    ]
    deltas, inputs = zip(*each, strict=True)
    return torch.cat(deltas), torch.cat(inputs)


@full_precision
def compressed(gradient: Tensor, basis: Tensor) -> Tensor:
    """Return G A^T (A A^T)^(-1), m x r: the B whose B A is closest to G.

    Source: GoRA, arXiv 2502.12171, section 3.

    Args:
        gradient: G, m x d float32.
        basis: A, r x d float32, of full rank.
    """
    rows = basis.double()
    found = torch.linalg.solve(rows @ rows.T, (gradient @ basis.T).double().T).T
    solved: Tensor = found.to(gradient).contiguous()
    return solved
