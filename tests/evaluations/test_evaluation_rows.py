"""Where rows come from, and rows that are not what they should be."""

import dataclasses
import gzip
import json

import pytest
from datasets import Dataset
from scripted import CASES, MATH_ROWS, Scripted, config, evaluated, scores

from tlora.errors import DataError
from tlora.evaluations import catalog
from tlora.evaluations.catalog import Settings
from tlora.scoring.answers import MARK
from tlora.tasks import source


@pytest.fixture
def hub(monkeypatch):
    """A Hub that has the rows of one case, a row in each configuration; returns what was asked."""
    asked = []

    def serve(rows):
        def read(name, config, split):
            asked.append((name, config, split))
            return Dataset.from_list([rows[(len(asked) - 1) % len(rows)]])

        monkeypatch.setattr(source, "read_hub", read)
        return asked

    return serve


def test_without_a_folder_rows_come_from_every_configuration_on_the_hub(hub, tmp_path):
    asked = hub(MATH_ROWS)
    with pytest.raises(DataError):  # a folder is never mixed with the Hub
        catalog.build(["math-paper"], str(tmp_path))
    assert asked == []
    task = catalog.build(["math-paper"])["math-paper"]
    assert [subset for _, subset, _ in asked] == config("math-paper")["dataset_kwargs"]["configs"]
    assert {(name, split) for name, _, split in asked} == {("EleutherAI/hendrycks_math", "test")}
    targets = CASES["math-paper"].targets
    assert [doc["target"] for doc in task.test_docs()] == [targets[n % 2] for n in range(7)]


def test_what_the_hub_does_not_have_asks_for_a_folder():
    name = "boolq-paper"
    with pytest.raises(DataError, match=rf"{name}: its rows are not on the Hub; give .*https://"):
        catalog.build([name])


def test_every_documented_place_is_looked_at_packed_or_not(tmp_path):
    name = "boolq-paper"
    case = CASES[name]
    for number, path in enumerate(config(name)["dataset_kwargs"]["files"]):
        for packed in ("", ".gz"):
            folder = dataclasses.replace(case, file=path + packed).write(
                tmp_path / f"{number}{packed}"
            )
            task = catalog.build([name], folder)[name]
            assert [doc["target"] for doc in task.test_docs()] == case.targets


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gsm8k-paper", {"answer": "no number"}, "does not end in a line"),
        ("math-paper", {"solution": "no box"}, "no .boxed answer"),
        ("piqa-paper", {"answer": "ending1"}, "which solution cannot read"),
        ("piqa-paper", {"output": "solution1"}, "does not end in 'the correct answer is"),
        ("svamp-llm-adapters", {"answer": "many"}, "which llm-adapters-number cannot read"),
        ("aqua-llm-adapters", {"answer": "4.5"}, "which llm-adapters-letter cannot read"),
        ("mbpp-paper", {"test_list": ["assert ("]}, "its tests are not valid Python"),
    ],
)
def test_a_row_that_cannot_be_scored_is_found_before_anything_is_generated(
    name, change, says, tmp_path
):
    case = CASES[name]
    folder = dataclasses.replace(case, rows=[case.rows[0] | change]).write(tmp_path)
    with pytest.raises(DataError, match=f"row 1: .*{says}"):
        catalog.build([name], folder, Settings(allow_code_execution=True))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "there are no rows"),
        (b"[1, 2]\n", "there are no rows with named columns"),
        (b'{"question": 1}\n{"question"\n', "not JSON after row 1"),
        (b"\xff\xfe", "line 1 is not UTF-8"),
    ],
)
def test_a_damaged_file_is_named(data, says, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"test\.jsonl: .*{says}"):
        catalog.build(["gsm8k-paper"], str(tmp_path))
    path.unlink()
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-9])
    with pytest.raises(DataError, match=r"test\.jsonl\.gz: cannot be read"):
        catalog.build(["gsm8k-paper"], str(tmp_path))


def test_a_string_may_hold_what_some_take_for_the_end_of_a_line(tmp_path):
    case = CASES["gsm8k-paper"]
    row = case.rows[0] | {"question": "one\u2028two\x0cthree"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    task = catalog.build(["gsm8k-paper"], str(tmp_path))["gsm8k-paper"]
    assert "one\u2028two\x0cthree" in task.test_docs()[0]["prompt"]


def test_a_box_without_the_mark_counts_for_math_verify_alone(tmp_path):
    folder = CASES["math-paper"].write(tmp_path)
    task = catalog.build(["math-paper"], folder)["math-paper"]
    found, _ = scores(task, lambda doc: f"So $\\boxed{{{doc['target']}}}$.")
    assert found == {"exact_match": 0.0, "math_verify": 1.0}
    found, items = scores(task, lambda doc: MARK + "0.5")
    # 0.5 is the one decimal that the published rule knows; the other item is not 0.5.
    assert [item["scores"]["math_verify"] for item in items] == [1.0, 0.0]


def test_replies_that_pad_the_work_of_a_process_do_not_count(tmp_path):
    """With several processes the harness asks the last request again, to even them out."""
    folder = CASES["mbpp-paper"].write(tmp_path)
    settings = Settings(allow_code_execution=True)
    for name, right in (("gsm8k-paper", CASES["gsm8k-paper"].right[0]), ("mbpp-paper", None)):
        CASES[name].write(tmp_path)
        task = catalog.build([name], folder, settings)[name]
        evaluated({name: task}, Scripted(right or CASES[name].right[0]))
        for instance in task.instances:
            instance.resps.append("padding")
        task.apply_filters()
        for instance in task.instances:
            (reading,) = instance.filtered_resps.values()
            assert set(reading["scores"].values()) == {1.0}
