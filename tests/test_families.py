"""Every family through the whole of it: calibrated, planned, attached, trained, saved, reloaded."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from families import FAMILIES
from support import assert_agrees, logits_of, one_at_a_time, train
from tlora import TLoraConfig, attach, calibrate, plan


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_adapted(name, tmp_path):
    kind = FAMILIES[name]
    model, batches = kind.build(), kind.batches()
    fresh = copy.deepcopy(model)
    config = TLoraConfig(r=2, lora_alpha=2, task_type=kind.task_type, **kind.adapter)
    with warnings.catch_warnings():
        # What the libraries have to say of these configurations is nothing to us.
        warnings.simplefilter("ignore")
        stats = calibrate(model, batches, config)
        assert_agrees(stats, one_at_a_time(model, kind.samples(), stats.modules))
        planned = plan(model, stats, config)
        assert all(m.captured_energy > 0 for m in planned.modules.values() if m.sensitivity)
        before = logits_of(model, batches[0])
        adapted = attach(model, planned)

        assert torch.equal(logits_of(adapted, batches[0]), before)
        start = {n: p.clone() for n, p in adapted.named_parameters()}
        losses = train(adapted, batches[0], steps=3)
        assert losses[-1] < losses[0]
        moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, start[n])}
        trains = {n for n, p in adapted.named_parameters() if p.requires_grad}
        assert moved <= trains
        assert {n for n in trains if "modules_to_save" not in n} == {
            n for n, _ in adapted.named_parameters() if "lora_B" in n
        }

        adapted.eval().save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    wrapped = [n for n, m in again.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert wrapped == list(planned.modules)
    expected = logits_of(adapted, batches[0])
    assert torch.equal(logits_of(again, batches[0]), expected)
    assert not torch.equal(expected, before)
