"""Training curves: read from a log, drawn to a file."""

from __future__ import annotations

import json

import pytest

from tlora.report import curves


def test_only_the_lines_with_the_field_are_read_in_order(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        {"step": 10, "loss": 2.0},
        {"step": 20, "loss": "1.5"},
        {"step": 20, "eval_loss": 9.0},
        {"step": 20, "train_runtime": 3.0},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.read_log(log) == [(10, 2.0), (20, 1.5)]
    assert curves.read_log(log, "eval_loss") == [(20, 9.0)]


def test_a_png_is_written_and_a_failed_drawing_leaves_none(tmp_path):
    path = curves.save(
        {"lora": [(1, 2.0), (2, 1.0)], "tlora": [(1, 2.0), (2, 0.5)]}, tmp_path / "a"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError):
        curves.save({"broken": [(1, 2.0), (2,)]}, tmp_path / "b")  # type: ignore[list-item]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
