import logging
import re

import peft
import pytest
import torch

from support import causal_samples, classified_samples, in_batches, padded
from tlora.adapter import principal_inputs
from tlora.adapter.freeze import lora_layers
from tlora.errors import CalibrationError, ConfigError
from tlora.methods.eva import EvaOptions
from tlora.registry import METHODS


def directions(model):
    return {n: layer.lora_A["default"].weight.detach() for n, layer in lora_layers(model)}


@pytest.mark.parametrize("whiten", [False, True])
def test_a_and_the_ranks_are_pefts_own(prepared_by, tiny_llama, batches, whiten):
    eva = peft.EvaConfig(rho=1.5, use_label_mask=False, whiten=whiten)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=eva,
    )
    expected = peft.get_peft_model(tiny_llama(initializer_range=0.2), config)
    peft.initialize_lora_eva_weights(expected, batches, show_progress_bar=False)
    prepared = prepared_by(
        "eva", tiny_llama(initializer_range=0.2), r=2, lora_alpha=3, rho=1.5, whiten=whiten
    )
    ours, pefts = directions(prepared.model), directions(expected)
    assert ours.keys() == pefts.keys()
    for name, value in pefts.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    scales = {n: layer.scaling["default"] for n, layer in lora_layers(prepared.model)}
    assert scales == {n: layer.scaling["default"] for n, layer in lora_layers(expected)}


def test_lines_tell_how_many_modules_have_not_settled(
    prepared_by, tiny_llama, batches, monkeypatch, caplog
):
    monkeypatch.setattr(principal_inputs, "_REPORTED", 1)
    caplog.set_level(logging.INFO, "tlora")
    prepared_by("eva", tiny_llama(), r=2, rho=1)
    lines = [each for each in caplog.messages if each.startswith("EVA: ")]
    left = [int(re.search(r"read, (\d+) modules left", line)[1]) for line in lines]
    assert lines[0].startswith("EVA: 2 batches read, ")  # the first finds which inputs are equal
    assert left[0] > left[-1] > 0


def test_labels_can_choose_the_tokens(prepared_by, tiny_llama, batches):
    whole = directions(prepared_by("eva", tiny_llama(), r=2, rho=1).model)
    answers = directions(prepared_by("eva", tiny_llama(), r=2, rho=1, use_label_mask=True).model)
    assert any(not torch.allclose(answers[name], a) for name, a in whole.items())


def test_what_reads_one_row_a_sample_starts_as_in_lora(prepared_by, tiny_bert_classifier, caplog):
    method = METHODS.load("eva")()
    data = in_batches(classified_samples((9, 8, 10, 7, 12, 6)), 3)
    options = EvaOptions(r=2, rho=1, task_type="SEQ_CLS")
    with caplog.at_level(logging.WARNING):
        prepared = method.prepare(tiny_bert_classifier(), options, data)
    assert "bert.pooler.dense: reads no tokens, so EVA does not apply" in caplog.text
    found = directions(prepared.model)
    [pooler] = [a for name, a in found.items() if "pooler" in name]
    assert pooler.shape == (2, 16)
    rows = [a @ a.T for name, a in found.items() if "pooler" not in name]
    assert len(rows) == 12
    for gram in rows:
        torch.testing.assert_close(gram, torch.eye(2), rtol=1e-4, atol=1e-4)


def test_batches_with_too_few_tokens_are_named(prepared_by, tiny_llama):
    short = [padded(causal_samples((9, 8))), padded(causal_samples((3,)))]
    with pytest.raises(CalibrationError, match=r"a batch has 3 tokens") as caught:
        prepared_by("eva", tiny_llama(), data=short, r=4, rho=1)
    assert "--calibration.batch_size" in str(caught.value)


def test_more_directions_than_inputs_are_refused(prepared_by, tiny_llama):
    with pytest.raises(ConfigError, match="`r` times `rho` is 18, more than the 16 inputs"):
        prepared_by("eva", tiny_llama(), r=9)


def test_directions_that_never_settle_end_it(prepared_by, tiny_llama, monkeypatch):
    monkeypatch.setattr("tlora.adapter.principal_inputs._MOST_BATCHES", 3)
    with pytest.raises(CalibrationError, match="did not settle after 3 batches"):
        prepared_by("eva", tiny_llama(), r=4, tau=1.0)


def test_no_batch_is_no_calibration(prepared_by, tiny_llama):
    for name in ("eva", "lora-ga", "corda"):
        with pytest.raises(CalibrationError, match="`batches` gave no sample"):
            prepared_by(name, tiny_llama(), data=[], r=2)
