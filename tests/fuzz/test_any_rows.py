"""Files of rows: JSON, CSV, Parquet, packed ones; judges' prompts and evaluations' rows."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from fuzzing import accepted, as_json, damaged, edited, fuzz
from hypothesis import strategies as st

from tlora import calibration_batches
from tlora.evaluations import rows as evaluation_rows
from tlora.registry import TASKS
from tlora.scoring.mtbench import prompts, questions
from tlora.tasks import source
from tlora.tasks.dataconfig import DataConfig

PAIRS = [{"prompt": f"{n} + {n} = ?", "response": f"It is {n + n}.", "n": n} for n in range(4)]
TURN = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "pairs": PAIRS,
    "chats": [{"messages": [{"role": "system", "content": "Be brief."}, *TURN], "tools": None}] * 3,
    "shares": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    "alpaca": [{"instruction": "Add.", "input": "1, 2", "output": "3", "history": [["a", "b"]]}],
    "text": [{"text": "one text"}, {"text": "another"}],
}
LABELED = [{"sentence": f"text {n}", "label": n % 2, "score": n / 2} for n in range(4)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def learned(path: Path, **fields: Any) -> None:
    """Read the rows of a task and make each into what is trained on."""
    task = TASKS.load("jsonl")(DataConfig(**fields))
    task.check_columns(source.columns_of(str(path)) or ["prompt", "response"])
    train, _ = task.load(str(path), None)
    task.rows(train, str(path))


@fuzz(110, data=st.data())
def test_rows_of_json_are_learned_or_refused(data, tmp_path):
    rows = ROWS[data.draw(st.sampled_from([*ROWS]))]
    form = data.draw(st.sampled_from((".jsonl", ".json")))
    whole = lines(rows) if form == ".jsonl" else as_json(rows)
    written = lines if form == ".jsonl" else as_json
    file = tmp_path / f"rows{form}"
    file.write_bytes(data.draw(damaged(whole) | edited(rows).map(written)))
    accepted(lambda: learned(file))


@fuzz(20, data=st.data(), kind=st.sampled_from(["classification", "regression", "seq2seq"]))
def test_rows_with_labels_are_learned_or_refused(data, kind, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(data.draw(damaged(lines(LABELED)) | edited(LABELED).map(lines)))
    label = "score" if kind == "regression" else "label"
    columns = {"text_column": "sentence", "label_column": label}
    if kind == "seq2seq":
        columns = {"prompt_column": "sentence", "response_column": label}
    accepted(lambda: learned(file, kind=kind, **columns))


TABLE = b'prompt,response\n"a, b",c\n007,2026-01-01\nd,"e\nf"\n'
TABLES = {".csv": TABLE, ".tsv": TABLE.replace(b",", b"\t"), ".txt": b"one\n\ntwo \xc3\xa9\n"}


@fuzz(40, data=st.data())
def test_tables_are_learned_or_refused(data, tmp_path):
    form = data.draw(st.sampled_from([*TABLES]))
    file = tmp_path / f"rows{form}"
    file.write_bytes(data.draw(damaged(TABLES[form])))
    accepted(lambda: learned(file))


def packed(form: str) -> bytes:
    whole = lines(PAIRS * 20)
    if form == ".gz":
        return gzip.compress(whole, mtime=0)
    return pyarrow.Codec("zstd").compress(whole, asbytes=True)


@fuzz(30, data=st.data())
def test_packed_rows_are_learned_or_refused(data, tmp_path):
    form = data.draw(st.sampled_from((".gz", ".zst")))
    file = tmp_path / f"rows.jsonl{form}"
    file.write_bytes(data.draw(damaged(packed(form))))
    accepted(lambda: learned(file))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    Dataset.from_list(ROWS["chats"]).to_parquet(file)
    return file.read_bytes()


@fuzz(16, data=st.data())
def test_parquet_is_learned_or_refused(parquet, data, tmp_path):
    file = tmp_path / "rows.parquet"
    foot = damaged(parquet[-700:]).map(lambda end: parquet[:-700] + end)
    file.write_bytes(data.draw(damaged(parquet) | foot))
    accepted(lambda: learned(file))


@fuzz(20, data=st.data())
def test_rows_of_an_evaluation_are_read_or_refused(data, tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_bytes(data.draw(damaged(lines(PAIRS)) | edited(PAIRS).map(lines)))
    found = accepted(lambda: evaluation_rows.read_json(file))
    assert found is None or all(isinstance(row, dict) for row in found)


NAMES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
JUDGE = [
    {"name": name, "system_prompt": "Grade.", "prompt_template": "{question_1} {answer_2}"}
    for name in NAMES
]
QUESTIONS = [{"question_id": n, "category": "math", "turns": ["a", "b"]} for n in (81, 82)]
REFERENCES = [{"question_id": n, "choices": [{"turns": ["c", "d"]}]} for n in (81, 82)]


@fuzz(20, data=st.data())
def test_prompts_of_a_judge_are_read_or_refused(data, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(data.draw(damaged(lines(JUDGE)) | edited(JUDGE).map(lines)))
    accepted(lambda: prompts.read_prompts(file))


@fuzz(14, asked=edited(QUESTIONS), told=edited(REFERENCES))
def test_questions_are_asked_or_refused(asked, told):
    accepted(lambda: questions.read_questions(asked, told))


TALKS = st.sampled_from([*ROWS["chats"], *ROWS["shares"], *PAIRS]).flatmap(edited)


@fuzz(20, rows=st.lists(TALKS, min_size=1, max_size=3))
def test_rows_become_calibration_batches_or_are_refused(tiny_tokenizer, rows):
    accepted(lambda: calibration_batches(tiny_tokenizer, rows, n=2))
