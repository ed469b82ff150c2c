"""Rows beyond a model's table of positions, or its embedding, are a sentence and no traceback."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers

from families import FAMILIES
from support import seeded
from tlora import TLoraConfig, calibrate, cli, get_tlora_model
from tlora.calibration.limits import fault_of_ids, table_of_positions
from tlora.errors import CalibrationError

TABLES = {
    "gpt2": 64,
    "opt": 64,
    "bart": 64,
    "bert": 64,
    "roberta": 63,
    "distilbert": 64,
    "deberta-v2": 64,
}


@pytest.mark.parametrize("family", TABLES)
def test_a_table_of_positions_is_what_the_model_runs_to(family):
    model = FAMILIES[family].build()
    room = table_of_positions(model)
    assert room == TABLES[family]
    ids = torch.full((1, room + 1), 5)
    model(input_ids=ids[:, 1:])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
    assert fault_of_ids(model, room, 5) is None
    assert f"{room + 1} tokens, and" in str(fault_of_ids(model, room + 1, 5))


@pytest.mark.parametrize("family", ["llama", "t5", "falcon", "llava"])
def test_models_without_a_table_of_positions_take_any_length(family):
    assert table_of_positions(FAMILIES[family].build()) is None


@pytest.fixture
def gpt2():
    config = transformers.GPT2Config(
        vocab_size=160, n_embd=16, n_layer=1, n_head=2, n_positions=8, pad_token_id=0
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.full((2, 9), 5), "input_ids has 9 tokens, and GPT2LMHeadModel has 8 positions"),
        (torch.full((2, 4), 160), "input_ids has the token id 160, .* has 160 rows; use the"),
    ],
)
def test_calibration_says_what_does_not_fit(gpt2, ids, says):
    batches, config = [{"input_ids": ids, "labels": ids}], TLoraConfig(r=2)
    with pytest.raises(CalibrationError, match=says):
        calibrate(gpt2, batches, config)
    # Within a budget the first batch runs once more, before all others.
    with pytest.raises(CalibrationError, match=says):
        get_tlora_model(gpt2, replace(config, memory_budget="1GiB"), batches)


@pytest.mark.parametrize("side", ["train", "eval"])
def test_rows_of_a_run_are_checked_before_the_folder_is_made(gpt2, saved, tmp_path, capsys, side):
    rows = {"train": [f"{n}" for n in range(8)], "eval": ["x"]}
    rows[side] = [*rows[side], "much longer than eight tokens"]
    for name, texts in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": t, "response": " y"}) + "\n" for t in texts))
    words = ["train", "--model", saved(gpt2), "--train_file", str(tmp_path / "train.jsonl")]
    words += ["--eval_file", str(tmp_path / "eval.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert (
        cli.main(
            [
                *words,
                "--trainer.use_cpu",
                "true",
                "--data.max_length",
                "512",
                "--data.format",
                "raw",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert f"{side}.jsonl" in error
    assert "GPT2LMHeadModel has 8 positions; set `max_length` to 8" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
