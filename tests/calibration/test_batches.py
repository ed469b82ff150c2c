"""Reading a batch: weights of the loss, masks, and cutting a batch into samples."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import support
from tlora import TLoraConfig, calibrate
from tlora.calibration.batches import (
    TokenLayout,
    as_batch,
    batch_size,
    decoder_mask,
    encoder_mask,
    loss_weights,
    real_tokens,
    single_samples,
)
from tlora.calibration.hooks import RealTokens
from tlora.errors import CalibrationError

CPU = torch.device("cpu")


def losses(model, samples) -> list[float]:
    with torch.no_grad():
        return [model(**sample).loss.item() for sample in samples]


@pytest.mark.parametrize(
    "name", ["llama-right", "gpt2-right", "bert", "bert-regression", "bert-multilabel", "t5", "vit"]
)
def test_the_batch_loss_is_the_mean_of_the_samples_by_their_weights(family_of, name):
    family = family_of(name)
    [batch] = family.batches(len(family.samples))
    weights = loss_weights(batch, family.model)

    # sum_s n_s / n L_s, which is what makes (n / n_s) undo a sample's share of the gradient.
    parts = zip(losses(family.model, family.samples), weights.tolist(), strict=True)
    expected = losses(family.model, [batch])[0]
    assert sum(loss / weight for loss, weight in parts) == pytest.approx(expected, rel=1e-5)


def test_token_and_masked_language_models_count_every_label():
    config = transformers.BertConfig(
        vocab_size=160, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, num_labels=2
    )
    labels = torch.tensor([[1, 0, -100, 1], [1, -100, -100, -100]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": labels}
    for kind in (transformers.BertForTokenClassification, transformers.BertForMaskedLM):
        weights = loss_weights(batch, kind(config))
        assert torch.equal(weights, torch.tensor([4 / 3, 4.0]))


def test_a_causal_model_never_scores_a_first_label(tiny_llama):
    labels = torch.tensor([[1, 5, 6, 7], [5, -100, -100, -100], [1, -100, -100, 3]])
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": labels}
    assert loss_weights(batch, tiny_llama()).tolist() == pytest.approx([4 / 3, math.inf, 4.0])


def test_an_unknown_loss_has_no_weights(tiny_llama):
    toy, ids = support.Toy(), torch.ones(2, 4, dtype=torch.long)
    assert loss_weights({"input_ids": ids, "labels": torch.ones(2)}, toy) is None
    assert loss_weights({"input_ids": ids, "labels": ids}, toy) is None
    assert loss_weights({"input_ids": ids, "labels": ids[:1]}, tiny_llama()) is None
    assert loss_weights({"input_ids": ids}, tiny_llama()) is None


def test_the_first_input_gives_the_number_of_samples():
    ids = torch.zeros(3, 4)
    assert batch_size({"temperature": torch.tensor(0.5), "input_ids": ids}) == 3
    assert batch_size({"scale": torch.tensor(0.5), "features": ids}) == 3


def test_masks_of_an_encoder_decoder():
    labels = torch.tensor([[5, -100, 6, -100], [-100, -100, -100, -100], [1, 1, 1, 1]])
    expected = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(decoder_mask({"labels": labels}), expected)
    given = torch.tensor([[1, 1, 0, 0]] * 3)
    assert torch.equal(decoder_mask({"labels": labels, "decoder_attention_mask": given}), given > 0)
    assert encoder_mask({"labels": labels}) is None


def test_a_mask_that_is_no_table_of_tokens_is_refused():
    mask = torch.ones(2, 1, 4, 4)
    with pytest.raises(CalibrationError, match=r"attention_mask.*\(2, 1, 4, 4\).*per token"):
        encoder_mask({"input_ids": torch.ones(2, 4), "attention_mask": mask})


@pytest.mark.parametrize("side", ["right", "left"])
def test_single_samples_are_the_samples(tiny_llama, side):
    samples = support.causal_samples()
    batch = support.padded(samples, side) | {"note": "kept", "temperature": torch.tensor(1.0)}
    cut = list(single_samples(batch, tiny_llama()))

    assert len(cut) == len(samples)
    for got, want in zip(cut, samples, strict=True):
        assert got["note"] == "kept"
        assert got["temperature"].item() == 1.0
        assert all(torch.equal(got[key], value) for key, value in want.items())
        if side == "left":
            assert got["position_ids"][0].tolist() == list(range(want["input_ids"].shape[1]))


@pytest.mark.parametrize("lengths", [((7, 4), (3, 9)), ((6, 2), (2, 6))])
def test_single_samples_of_an_encoder_decoder_are_the_samples(tiny_t5, lengths):
    samples = support.translated_samples(lengths)
    for got, want in zip(single_samples(support.padded(samples), tiny_t5()), samples, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_batch_of_another_kind_is_named():
    with pytest.raises(CalibrationError, match=r"is a tuple; give dicts.*input_ids"):
        as_batch((torch.ones(1),), CPU)
    with pytest.raises(CalibrationError, match=r"keys \['input_ids'\] holds no tensor.*pt"):
        as_batch({"input_ids": [[1, 2]]}, CPU)


def test_one_sample_without_its_batch_dimension_is_refused():
    with pytest.raises(CalibrationError, match=r"input_ids has the shape \(5,\); give samples x"):
        as_batch({"input_ids": torch.arange(5)}, torch.device("cpu"))


@pytest.mark.parametrize(("side", "attention"), [("left", "eager"), ("right", "sdpa")])
def test_labels_of_first_tokens_change_nothing_whatever_the_padding(tiny_llama, side, attention):
    model = tiny_llama(initializer_range=0.2)
    model.set_attn_implementation(attention)
    samples = [sample | {"labels": sample["input_ids"]} for sample in support.causal_samples()]
    config = TLoraConfig(r=2, lora_alpha=2)
    stats = calibrate(model, support.in_batches(samples, 5, side), config)
    support.assert_agrees(stats, support.one_at_a_time(model, samples, stats.modules))


def test_a_classified_sample_without_a_label_weighs_nothing(tiny_llama):
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=160, num_labels=3, **shape)
    model = transformers.BertForSequenceClassification(config)
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([2, -100, 0])}
    assert loss_weights(batch, model).tolist() == [2.0, math.inf, 2.0]
    model.config.num_labels = 1  # numbers to predict, not classes
    assert loss_weights(batch, model).tolist() == [3.0, 3.0, 3.0]


def test_tensors_inside_lists_and_dicts_are_moved_too():
    more = {"size": torch.ones(1), "name": "a"}
    batch = {"pixel_values": torch.ones(1, 2), "images": [torch.ones(2)], "more": more, "n": 1}
    moved = as_batch(batch, torch.device("meta"))
    assert moved["images"][0].is_meta and moved["more"]["size"].is_meta
    assert (moved["more"]["name"], moved["n"]) == ("a", 1)
    assert not batch["images"][0].is_meta


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (
            {
                "input_ids": torch.zeros(2, 3, dtype=torch.long),
                "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
            },
            5,
        ),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.zeros(2)}, 6),
        ({"labels": torch.zeros(2, dtype=torch.long), "inputs_embeds": torch.zeros(2, 7, 4)}, 14),
        ({"labels": torch.zeros(2, dtype=torch.long)}, 0),
        ("no batch", 0),
    ],
)
def test_the_tokens_that_count_are_counted(batch, tokens):
    assert real_tokens(batch) == tokens


def test_real_tokens_are_looked_up_once_for_all_modules_that_read_a_mask():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    layout = TokenLayout(2, mask)
    same = layout.mask_on(mask, torch.device("cpu"))
    assert layout.mask_on(mask, torch.device("cpu")) is same
    tokens = RealTokens()
    places = tokens.places(same)
    assert places.tolist() == [0, 2, 3, 4]
    assert tokens.places(same) is places
    assert tokens.places(None) is None
