"""Exact match counts right answers, whatever their place in a batch."""

from __future__ import annotations

from tlora.demo.corpus import held_out_rows
from tlora.demo.run import _load_base
from tlora.demo.solve import answers, exact_match


def test_answers_do_not_depend_on_the_batch_and_the_model_is_left_as_it_was():
    model, tokenizer = _load_base()
    prompts = [row["prompt"] for row in held_out_rows("gain", seed=1, count=6)]
    prompts += [row["prompt"] for row in held_out_rows("symbols", seed=1, count=6)]
    side = tokenizer.padding_side
    model.train()
    alone = answers(model, tokenizer, prompts, batch_size=1)
    assert answers(model, tokenizer, prompts, batch_size=12) == alone
    assert model.training
    assert tokenizer.padding_side == side


def test_exact_match_is_the_share_of_equal_answers():
    model, tokenizer = _load_base()
    rows = held_out_rows("symbols", seed=2, count=4)
    written = answers(model, tokenizer, [row["prompt"] for row in rows])
    right = [dict(row, response=w) for row, w in zip(rows, written, strict=True)]
    assert exact_match(model, tokenizer, right) == 1.0
    wrong = [*right[:3], dict(right[3], response="no number")]
    assert exact_match(model, tokenizer, wrong) == 0.75
