"""Rows held out of the training rows."""

import pytest

from tlora.errors import ConfigError, DataError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.heldout import held_out
from tlora.training.runconfig import RunConfig
from tlora.training.setup import settle

ROWS = [{"prompt": f"What is {n // 2}?", "response": f" {n}"} for n in range(40)]


@pytest.mark.parametrize(("size", "count"), [(0.1, 4), (10, 10), (0.5, 20)])
def test_a_share_or_a_number_is_held_out_and_a_question_is_on_one_side(size, count):
    held = held_out(ROWS, DataConfig(val_size=size), "rows")
    assert len(held) == count
    kept = set(range(40)) - {*held}
    assert {ROWS[i]["prompt"] for i in held}.isdisjoint(ROWS[i]["prompt"] for i in kept)


def test_the_seed_says_which():
    def held(**data):
        return held_out(ROWS, DataConfig(val_size=10, **data), "rows")

    assert held() == held() == held(subset_seed=0) != held(subset_seed=1)


@pytest.mark.parametrize("size", [40, 100])
def test_both_sides_need_rows(size):
    with pytest.raises(DataError, match=r"holds out \d+ of 40 rows \(20 distinct prompts\)"):
        held_out(ROWS, DataConfig(val_size=size), "rows")
    with pytest.raises(DataError, match="holds out 0 of 2 rows"):
        held_out(ROWS[:2], DataConfig(val_size=1), "rows")


@pytest.mark.parametrize("size", [0, 1.5, -1])
def test_other_sizes_are_refused(size):
    with pytest.raises(
        ConfigError, match=r"`data\.val_size` is .*a fraction below 1 or a number of rows"
    ):
        RunConfig.from_dict({"data": {"val_size": size}})


def test_a_run_trains_on_the_rest(config):
    setup = settle(config(data=DataConfig(format="raw", val_size=6)))
    assert (len(setup.train), len(setup.held_out)) == (18, 6)
    with pytest.raises(ConfigError, match=r"`eval_file` and `data\.val_size` are both given"):
        config(eval_file="x.jsonl", data=DataConfig(val_size=6))
