"""Which samples of a batch cannot count, and what to say of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tlora.calibration.hooks import Record


class BadSamples(Exception):
    """Samples that cannot count; internal, answered by an error or by leaving them out.

    Attributes:
        rows: which of the unit's.
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
