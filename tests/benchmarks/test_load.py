"""The load script notices growth, and writes rows of its own."""

import json

import pytest

MIB = 2**20


@pytest.fixture
def load(script):
    return script(".", "load")


def test_growth_is_from_a_fifth_on(load):
    warming = [100 * MIB + 10 * MIB * n for n in range(20)]
    level = [300 * MIB] * 80
    assert load.growth(warming + level) == 0
    assert load.growth(warming + [300 * MIB + n * MIB for n in range(80)]) == 70 * MIB


def test_the_rows_are_all_different(load, tmp_path):
    file = tmp_path / "rows.jsonl"
    size = load.write_jsonl(file, 2000)
    lines = file.read_text().splitlines()
    assert size == file.stat().st_size
    assert len({json.loads(line)["prompt"] for line in lines}) == 2000
