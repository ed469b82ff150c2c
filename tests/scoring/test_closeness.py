"""ROUGE and chrF: their definitions, by hand."""

import pytest

from tlora.scoring.closeness import chrf, rouge


def test_rouge_is_the_f_measure_of_words_pairs_and_the_common_subsequence():
    found = rouge("the cat sat down", "the cat quickly sat")
    # Three of four words each way; one of three pairs; "the cat sat" of four words.
    assert found == {
        "rouge1": pytest.approx(3 / 4),
        "rouge2": pytest.approx(1 / 3),
        "rougeL": pytest.approx(3 / 4),
    }
    assert rouge("sat cat", "cat sat") == pytest.approx({"rouge1": 1, "rouge2": 0, "rougeL": 0.5})


def test_rouge_weighs_what_is_missed_as_what_is_too_much():
    assert rouge("one two", "one")["rouge1"] == pytest.approx(2 / 3)
    assert rouge("one", "one two")["rouge1"] == pytest.approx(2 / 3)
    assert set(rouge("", "one").values()) == {0.0}


def test_chrf_is_100_for_equal_texts_and_0_for_texts_of_other_letters():
    assert chrf(["a reply", "so"], ["a reply", "so"]) == pytest.approx(100)
    assert chrf(["zzz"], ["aaa"]) == 0


def test_chrf_counts_characters_of_all_replies_together():
    # Sums of two texts, not the mean of their scores.
    both = chrf(["abcdefgh", "zz"], ["abcdefgh", "aa"])
    assert 50 < both < 100
