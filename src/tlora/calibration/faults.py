"""Which samples of a batch cannot count, and what to say when a calibration fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tlora.calibration.hooks import Record
from tlora.config import TLoraConfig
from tlora.errors import CalibrationError

_SHOWN = 10  # samples named in one message

T = TypeVar("T")


class BadSamples(Exception):
    """Samples that cannot count; internal, answered by an error or by leaving them out.

    Attributes:
        rows: which of the micro-batch's.
        reason: a few words, "its loss is nan".
        sentence: the whole error, with {} for the sample.
    """

    def __init__(self, rows: list[int], reason: str, sentence: str) -> None:
        super().__init__(reason)
        self.rows = rows
        self.reason = reason
        self.sentence = sentence


def check_inputs(records: Mapping[str, Record]) -> None:
    """Look at the inputs of all targets, once split.

    Raises:
        BadSamples: some are not finite at real tokens.
    """
    calls = [
        (r.target.name, call)
        for r in records.values()
        for call in r.calls
        if call.inputs.numel() > 0
    ]
    if not calls:
        return
    device = calls[0][1].inputs.device
    # A sum is finite only if every entry is: the cheapest check, one transfer for all. Should
    # finite entries overflow it, the exact look below finds nothing wrong.
    sums = [c.inputs.sum(dtype=torch.float32).to(device) for _, c in calls]
    if torch.stack(sums).isfinite().all():
        return
    for name, call in calls:
        bad = ~call.rows.isfinite().all(dim=-1)
        if call.mask is not None:
            bad &= call.mask
        if bad.any():
            raise BadSamples(
                bad.any(dim=1).nonzero().flatten().tolist(),
                f"the input of {name} is not finite",
                f"{name}: its input is not finite on {{}}; check that sample, or calibrate in"
                " float32 or bfloat16.",
            )


def check_gradients(found: Mapping[str, Tensor]) -> None:
    """Look at what a backward pass gave: B numbers for each target.

    Raises:
        BadSamples: some are not finite.
    """
    if not found:
        return
    device = next(iter(found.values())).device
    finite = torch.stack([values.to(device) for values in found.values()]).isfinite()
    if finite.all():
        return
    rows = (~finite.all(dim=0)).nonzero().flatten().tolist()
    name = list(found)[int(finite[:, rows[0]].int().argmin())]
    raise BadSamples(
        rows,
        f"the gradient at {name} is not finite",
        f"{name}: the gradient of the loss is not finite on {{}}; calibrate in float32 or bfloat16,"
        " or leave the sample out (skip_bad_samples).",
    )


def checked_weights(weights: Tensor | None) -> Tensor:
    """Return the weights of the samples' losses (`batches.loss_weights`); 1 where not known.

    Raises:
        BadSamples: some have no label that counts.
    """
    if weights is None:
        return torch.ones(1)
    if empty := (~weights.isfinite()).nonzero().flatten().tolist():
        raise BadSamples(
            empty,
            "it has no label that counts",
            "{} has no label that counts: every label is -100, so its loss is undefined; leave it"
            " out (skip_bad_samples) or truncate less.",
        )
    return weights


def within_memory(
    action: Callable[[], T], where: Callable[[], str], samples: int, config: TLoraConfig
) -> T:
    """Return ``action()``; should memory run out, say where and what to lower.

    A device raises torch.OutOfMemoryError, the CPU's allocator a bare RuntimeError.

    Args:
        action: what is done.
        where: says what of it is being done, once it has failed.
        samples: in the batch; 0: none is in memory.
        config: what was asked for.

    Raises:
        CalibrationError: memory ran out.
        RuntimeError: what else ``action`` raises.
    """
    try:
        return action()
    except RuntimeError as error:
        text = str(error).strip()
        if not (
            isinstance(error, torch.OutOfMemoryError)
            or "DefaultCPUAllocator" in text
            or "out of memory" in text
        ):
            raise
    # Not inside `except`: the first error holds on to every tensor of what has failed.
    raise CalibrationError(
        f"out of memory in {where()}: {text.splitlines()[0].rstrip('.')};{_smaller(samples)} lower"
        " `memory_budget`, what second moments may take (now"
        f" {'no limit' if config.memory_budget is None else repr(config.memory_budget)})."
    )


def _smaller(samples: int) -> str:
    if samples > 1:
        return (
            " make the batches smaller (`calibration.batch_size` on the command line; this one has"
            f" {samples} samples), or"
        )
    return " shorten the samples (`data.max_length` on the command line), or" if samples else ""


def numbered(first: int, count: int) -> str:
    """Return "samples 4 to 7 (counted from 0)"."""
    return f"{f'sample {first}' if count == 1 else f'samples {first} to {first + count - 1}'}" + (
        " (counted from 0)"
    )


def warn_of_skipped(skipped: Mapping[Any, str], given: int, stacklevel: int) -> None:
    """Warn once of the samples that were left out.

    Args:
        skipped: number of each, and why.
        given: how many there were in all.
        stacklevel: as in `warnings.warn`, of the caller.
    """
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {given} calibration samples were left out as bad, counted from 0:"
            f" {_listed(skipped)}.",
            stacklevel=stacklevel + 1,
        )


def warn_of_unreached(names: Sequence[str], stacklevel: int) -> None:
    """Warn once of targets that ran in no batch, as those whose weight another module reads.

    Args:
        names: the targets.
        stacklevel: as in `warnings.warn`, of the caller.
    """
    if names:
        shown = ", ".join(names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        warnings.warn(
            f"{shown}{more} ran in no calibration batch, so nothing is known of their inputs and an"
            " adapter may learn nothing there; leave them out (`exclude_modules`) or give samples"
            " that reach them.",
            stacklevel=stacklevel + 1,
        )


def refuse_none_left(skipped: Mapping[int, str]) -> None:
    """Raise for a calibration of which no sample counts.

    Raises:
        CalibrationError: always.
    """
    if skipped:
        raise CalibrationError(
            f"all {len(skipped)} calibration samples are bad: {_listed(skipped)}; give samples"
            " that train, or calibrate in float32 or bfloat16."
        )
    raise CalibrationError("`batches` gave no sample; give at least one batch.")


def _listed(skipped: Mapping[Any, str]) -> str:
    shown = [f"{number} ({reason})" for number, reason in list(skipped.items())[:_SHOWN]]
    more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    return f"{', '.join(shown)}{more}"
