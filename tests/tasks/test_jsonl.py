import json

import numpy as np
import pytest

from tlora.errors import ConfigError, DataError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl


@pytest.fixture
def first_row(tmp_path):
    """Write one row as JSONL and return what the task makes of it."""

    def make(raw, **data):
        file = tmp_path / "train.jsonl"
        file.write_text(json.dumps(raw) + "\n")
        task = Jsonl(DataConfig(**{"format": "raw", **data}))
        train, _ = task.load(str(file), None)
        return task.row(train[0], "train.jsonl, row 1")

    return make


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}),
        ({"question": "a", "answer": "b"}, {"prompt": "a", "response": "b"}),
        ({"instruction": "a", "output": "b"}, {"prompt": "a", "response": "b"}),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            {"prompt": "a\n\nc", "response": "b"},
        ),
        ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "response": "b"}),
        ({"text": "a", "id": 3}, {"text": "a"}),
        (
            {"messages": [{"role": "assistant", "content": "b"}], "text": "a"},
            {"messages": [{"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_well_known_columns_are_found(first_row, raw, expected):
    assert first_row(raw) == expected


def test_named_columns_and_a_template_over_any_columns(first_row):
    raw = {"ask": "2+{2}?", "unit": "apples", "reply": 4}
    row = first_row(raw, prompt_template="{ask} In {unit}: {{", response_column="reply")
    assert row == {"prompt": "2+{2}? In apples: {", "response": "4"}


def test_evaluation_rows_may_lack_the_input_that_training_rows_have(tmp_path):
    files = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    row = {"instruction": "a", "output": "b"}
    for file, raw in zip(files, (row | {"input": "c"}, row), strict=True):
        file.write_text(json.dumps(raw) + "\n")
    task = Jsonl(DataConfig(format="raw"))
    train, held_out = task.load(*map(str, files))
    assert task.row(train[0], "row 1")["prompt"] == "a\n\nc"
    assert task.row(held_out[0], "row 1")["prompt"] == "a"


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("csv", 'prompt,response\n"NA, said he",null\n'),
        ("tsv", "prompt\tresponse\nNA, said he\tnull\n"),
        ("json", '[{"prompt": "NA, said he", "response": "null"}]'),
    ],
)
def test_words_that_look_like_missing_values_stay_words(tmp_path, suffix, text):
    file = tmp_path / f"train.{suffix}"
    file.write_text(text)
    task = Jsonl(DataConfig(format="raw"))
    train, _ = task.load(str(file), None)
    assert task.row(train[0], "row 1") == {"prompt": "NA, said he", "response": "null"}


@pytest.fixture
def classification(tmp_path):
    def make(values, **data):
        file = tmp_path / "rows.jsonl"
        lines = [json.dumps({"review": f"text {v}", "stars": v}) for v in values]
        file.write_text("\n".join(lines))
        data = {"kind": "classification", "text_column": "review", "label_column": "stars"} | data
        task = Jsonl(DataConfig(**data))
        train, _ = task.load(str(file), None)
        return task, train

    return make


def test_classes_are_the_sorted_labels_numbers_as_numbers(classification):
    task, train = classification([10, 9, 2, 9])
    assert task.label_names == ["2", "9", "10"]
    assert [task.row(raw, "row")["label"] for raw in train] == [2, 1, 0, 1]
    task, _ = classification(["b", "10", "a", "9"])  # cells of tables are text
    assert task.label_names == ["9", "10", "a", "b"]


def test_texts_with_labels_are_said_with_what_is_not_read(classification, tmp_path, caplog):
    with caplog.at_level("INFO"):
        classification([0, 1], text_column="stars", label_column="stars")
    assert [row.getMessage() for row in caplog.records] == [
        f"{tmp_path / 'rows.jsonl'}: reading 2 rows as texts with labels.",
        f"{tmp_path / 'rows.jsonl'}: ignoring unused columns 'review'.",
    ]


def test_given_classes_keep_their_order_and_others_are_refused(classification):
    task, train = classification(["good", "bad", "odd"], label_names=["good", "bad"])
    assert [task.row(raw, "row")["label"] for raw in train.select(range(2))] == [0, 1]
    with pytest.raises(DataError, match=r"column 'stars' is 'odd', not one of 'good', 'bad'"):
        task.row(train[2], "row")


def test_metrics_equal_the_hand_computed_ones(classification):
    task, _ = classification([0, 1])
    scores = task.metrics(np.eye(2)[[0, 0, 1, 1]], np.array([0, 1, 1, 1]))
    # Class 0: precision 1/2, recall 1; class 1: precision 1, recall 2/3.
    assert scores == pytest.approx({"accuracy": 3 / 4, "f1_macro": (2 / 3 + 4 / 5) / 2})
    task, _ = classification([0.5, 1.5], kind="regression")
    scores = task.metrics(np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 2.0, 5.0]))
    assert scores["mse"] == pytest.approx(4 / 3)
    assert scores["spearmanr"] == pytest.approx(1.0)


@pytest.mark.parametrize("response", ["response", "completion", "output", "answer"])
def test_where_only_the_prompt_is_named_the_usual_response_is_taken(first_row, response):
    row = {"asked": "a", "id": 3, response: "b"}
    assert first_row(row, prompt_column="asked") == {"prompt": "a", "response": "b"}
    assert first_row(row, prompt_template="<{asked}>") == {"prompt": "<a>", "response": "b"}
    with pytest.raises(ConfigError) as caught:
        first_row(row, prompt_column="aksed")
    assert len(caught.value.faults) == 1
    with pytest.raises(ConfigError, match=r"`data\.response_column` is missing"):
        first_row({"asked": "a", "told": "b"}, prompt_column="asked")


def test_whole_numbers_written_as_floats_are_the_same_classes(classification):
    task, train = classification(["0", "1.0", "0.0", "1", "1.5"])
    assert task.label_names == ["0", "1", "1.5"]
    assert [task.row(raw, "row")["label"] for raw in train] == [0, 1, 0, 1, 2]
    task, _ = classification([0.0, 1.0], label_names=["0.0", "1.0"])
    assert task.row({"review": "x", "stars": 1}, "row")["label"] == 1


def test_an_option_without_effect_on_the_rows_is_said(first_row, caplog):
    first_row({"text": "a"}, system="Be brief.", chat_template="chatml", format="auto")
    assert "`data.system` has no effect on plain text." in caplog.text
    assert "`data.chat_template` has no effect on these rows." in caplog.text
    caplog.clear()
    first_row({"prompt": "a", "response": "b"}, system="Be brief.")
    first_row({"prompt": "a", "response": "b"}, chat_template="chatml", format="chat")
    assert "no effect" not in caplog.text


def test_a_format_without_effect_is_refused():
    with pytest.raises(ConfigError, match="'alpaca', which has no effect on a regression task"):
        Jsonl(DataConfig(kind="regression", format="alpaca"))
    Jsonl(DataConfig(kind="seq2seq", format="alpaca"))
