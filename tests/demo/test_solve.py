"""Exact match counts right answers, whatever their place in a batch."""

from __future__ import annotations

from tlora.demo.corpus import shifted_task
from tlora.demo.run import _load_base
from tlora.demo.solve import answers, exact_match


def test_answers_do_not_depend_on_the_batch_and_the_model_is_left_as_it_was():
    model, tokenizer = _load_base()
    rows = [row for form in ("ledger", "program") for row in shifted_task(1, 1, 3, form)[1]]
    prompts = [row["prompt"] for row in rows]
    side = tokenizer.padding_side
    model.train()
    alone = answers(model, tokenizer, prompts, batch_size=1)
    assert answers(model, tokenizer, prompts, batch_size=6) == alone
    assert model.training
    assert tokenizer.padding_side == side


def test_exact_match_is_the_share_of_equal_answers():
    model, tokenizer = _load_base()
    rows = shifted_task(2, 1, 4)[1]
    written = answers(model, tokenizer, [row["prompt"] for row in rows])
    right = [dict(row, response=w) for row, w in zip(rows, written, strict=True)]
    assert exact_match(model, tokenizer, right) == 1.0
    wrong = [*right[:3], dict(right[3], response="no number")]
    assert exact_match(model, tokenizer, wrong) == 0.75
