"""The eight ablations of the paper, A frozen and not: each attaches, trains and counts right."""

from __future__ import annotations

import itertools

import pytest
import torch

from support import logits_of, train
from tlora import attach, calibrate, plan

SWITCHES = list(itertools.product([True, False], repeat=3))


@pytest.mark.parametrize(
    ("init", "ranks", "scales", "frozen"),
    [*((*each, True) for each in SWITCHES), (True, False, True, False)],
)
def test_every_combination_trains_what_it_promises(calibrated, init, ranks, scales, frozen):
    base = calibrated("llama-right")
    config = base.config(
        basis="weight-covariance" if init else "random",
        allocate_rank=ranks,
        allocate_scale=scales,
        freeze_a=frozen,
        r=3,
    )
    # Calibrated for this very combination, which measures no more than it needs.
    stats = calibrate(base.model, [base.batch], config)
    planned = plan(base.model, stats, config)
    before = logits_of(base.model, base.batch)

    adapted = attach(base.model, planned)

    modules = list(planned.modules.values())
    assert torch.equal(logits_of(adapted, base.batch), before)
    assert (len({module.rank for module in modules}) > 1) == ranks
    assert (len({module.scale for module in modules}) > 1) == scales
    orthonormal = [
        torch.allclose(m.lora_A @ m.lora_A.T, torch.eye(m.rank), atol=1e-4) for m in modules
    ]
    assert all(orthonormal) if init else not any(orthonormal)
    expected = sum(m.rank * (m.d_out + (0 if frozen else m.d_in)) for m in modules)
    if not ranks:
        # 2 layers: outputs 16 + 8 + 8 + 16 + 32 + 32 + 16 and as many inputs.
        assert expected == 3 * 2 * 128 * (1 if frozen else 2)
    needing = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in needing.values()) == planned.trainable_parameters == expected

    start = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    losses = train(adapted.train(), base.batch, steps=3)
    assert losses[-1] < losses[0]
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, start[n])}
    assert moved == set(needing)
