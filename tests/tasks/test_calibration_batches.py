"""`calibration_batches` gives the tokens and labels that training reads."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from tlora import TLoraConfig, calibration_batches, get_tlora_model
from tlora.errors import ConfigError, DataError
from tlora.training.runconfig import RunConfig
from tlora.training.setup import settle

# The prompts differ in their first token, so that rows can be sorted by it.
PAIRS = [{"prompt": f"{n} and one more is", "completion": " " + "I" * (n + 1)} for n in range(9)]


def by_prompt(batch):
    order = batch["input_ids"][:, 0].argsort()
    return {name: tensor[order] for name, tensor in batch.items()}


def test_a_batch_is_the_one_of_a_training_run_on_the_same_rows(tiny_llama, saved, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in PAIRS))
    setup = settle(
        RunConfig.from_dict(
            {
                "model": saved(tiny_llama()),
                "train_file": str(file),
                "calibration": {"samples": 9, "batch_size": 9},
                "data": {"max_length": 20},
            }
        )
    )
    (trained,) = map(by_prompt, setup.calibration_batches())
    (drawn,) = map(
        by_prompt, calibration_batches(setup.tokenizer, PAIRS, batch_size=9, max_length=20)
    )
    assert trained.keys() == drawn.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, drawn[name])


def test_n_rows_are_drawn_in_batches(tiny_tokenizer):
    batches = calibration_batches(tiny_tokenizer, PAIRS, 7, batch_size=3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    again = calibration_batches(tiny_tokenizer, Dataset.from_list(PAIRS), 7, batch_size=3)
    assert all(
        torch.equal(a[name], b[name]) for a, b in zip(batches, again, strict=True) for name in a
    )
    other = calibration_batches(tiny_tokenizer, PAIRS, 7, batch_size=3, seed=1)
    assert not torch.equal(batches[0]["labels"], other[0]["labels"])
    first = calibration_batches(tiny_tokenizer, iter(PAIRS), 2)
    assert tiny_tokenizer.decode(first[0]["input_ids"][1], skip_special_tokens=True).startswith("1")


def test_padding_has_neither_attention_nor_labels(tiny_tokenizer):
    (batch,) = calibration_batches(tiny_tokenizer, [{"text": "a"}, {"text": "a b c d"}])
    short = batch["attention_mask"].sum(dim=1).argmin()
    padding = batch["attention_mask"][short] == 0
    assert padding.any()
    assert (batch["labels"][short][padding] == -100).all()
    assert torch.equal(batch["labels"][short][~padding], batch["input_ids"][short][~padding])


def test_classes_are_stacked(tiny_tokenizer):
    rows = [{"sentence": "good", "label": "yes"}, {"sentence": "bad one", "label": "no"}]
    (batch,) = calibration_batches(
        tiny_tokenizer,
        rows,
        kind="classification",
        text_column="sentence",
        label_column="label",
        label_names=["no", "yes"],
    )
    assert sorted(batch["labels"].tolist()) == [0, 1]
    assert batch["input_ids"].shape == batch["attention_mask"].shape


def test_a_model_is_initialized_from_rows(tiny_llama, tiny_tokenizer):
    batches = calibration_batches(tiny_tokenizer, PAIRS, 4)
    config = TLoraConfig(r=2, lora_alpha=2, task_type="CAUSAL_LM")
    model = get_tlora_model(tiny_llama(), config, batches)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_B" in name for name in trained)


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([], {}, DataError, "no rows to calibrate on"),
        (PAIRS, {"n": 0}, ConfigError, "`n` is 0"),
        (PAIRS, {"max_lenght": 3}, ConfigError, "Did you mean 'max_length'"),
        (PAIRS, {"max_length": 0}, ConfigError, "`data.max_length` is 0"),
        (PAIRS, {"max_length": 1}, DataError, "raise max_length"),
        ([{"left": "a", "right": "b"}], {}, ConfigError, "the columns left, right are not rec"),
        ([{"prompt": "a", "response": None}], {}, DataError, "calibration row 1"),
        ([{"prompt": "\ud800", "response": "a"}], {}, DataError, "row 1 has .*, half of a"),
    ],
)
def test_bad_input_is_refused(tiny_tokenizer, rows, options, error, words):
    with pytest.raises(error, match=words):
        calibration_batches(tiny_tokenizer, rows, **options)
