"""Questions, prompts, grades and means, without a judge and without a model."""

import json

import pytest

from tlora.errors import DataError
from tlora.scoring.mtbench import prompts as prompts_module
from tlora.scoring.mtbench.endpoint import Reply
from tlora.scoring.mtbench.judgeconfig import JudgeConfig
from tlora.scoring.mtbench.judging import answer_lines, graded, means, metric_names
from tlora.scoring.mtbench.prompts import OURS, digest, rating, read_prompts
from tlora.scoring.mtbench.questions import Question, read_questions

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again, in {braces}."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Plus 1?"], "reference": ["x"]},
]
REFERENCES = [{"question_id": 111, "choices": [{"index": 0, "turns": ["two", "three"]}]}]


def answered():
    found = read_questions(QUESTIONS, REFERENCES)
    return [answer_lines(q, ("answer {one}", "answer two"), ("p1", "p2")) for q in found]


def test_questions_are_read_with_the_references_that_their_category_needs():
    assert read_questions(QUESTIONS, REFERENCES) == [
        Question("81", "writing", ("Write.", "Again, in {braces}.")),
        Question("111", "math", ("1 + 1?", "Plus 1?"), ("two", "three")),
    ]
    with pytest.raises(DataError, match="the questions 111"):
        read_questions(QUESTIONS, [])


@pytest.mark.parametrize(
    ("rows", "references"),
    [
        ([{"question_id": 1, "category": "math"}], []),
        ([QUESTIONS[0] | {"turns": ["one"]}], []),
        ([QUESTIONS[0] | {"category": ["math"]}], []),
        (QUESTIONS, [{"question_id": 111}]),
        (QUESTIONS, [{"question_id": 111, "choices": []}]),
    ],
)
def test_rows_that_are_no_questions_and_answers_are_refused(rows, references):
    with pytest.raises(DataError, match="lacks a question with two turns or answers to both"):
        read_questions(rows, references)


def test_the_published_temperatures():
    published = dict.fromkeys(("writing", "roleplay"), 0.7) | {"stem": 0.1, "humanities": 0.1}
    published |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
    for name, temperature in published.items():
        assert Question("1", name, ("a", "b")).temperature == temperature


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Good. Rating: [[7]]", 7),
        ("[[8.5]]", 8.5),
        ("[[9.]]", 9),
        ("Rating: [6]", 6),
        ("of [3] sources, [[10]] counts", 10),
        ("first [[2]], then [[9]]", 2),
        ("[[0]]", 0),
        ("[[-3]]", None),
        ("[[7/10]]", None),
        ("[[ 7 ]]", None),
        ("[7,8]", None),
        ("7 of 10", None),
        ("", None),
    ],
)
def test_a_grade_is_read_as_published(text, number):
    assert rating(text) == number


def test_our_prompts_ask_for_the_form_that_is_read():
    for (turn, with_reference), (system, _) in OURS.prompts.items():
        assert "from 1 (useless) to 10" in system
        assert rating(system) == 4  # the example
        assert ("reference" in system) == with_reference
        assert ("second request alone" in system) == (turn == 2)


def test_messages_hold_the_turn_the_conversation_and_the_references():
    plain, math = answered()
    first, second = (OURS.messages(*plain, turn) for turn in (1, 2))
    assert [m["role"] for m in first] == ["system", "user"]
    assert "answer {one}" in first[1]["content"]
    assert "answer two" not in first[1]["content"]
    said = ("Write.", "answer {one}", "Again, in {b", "answer two")
    places = [second[1]["content"].index(text) for text in said]
    assert places == sorted(places)
    first, second = (OURS.messages(*math, turn)[1]["content"] for turn in (1, 2))
    assert "two" in first.replace("answer two", "")
    assert "three" not in first
    assert "three" in second


def prompt_rows():
    one, two = "{question} | {answer}", "{question_1} | {answer_1} | {question_2} | {answer_2}"
    templates = {
        "single-v1": one,
        "single-math-v1": one + " | {ref_answer_1}",
        "single-v1-multi-turn": two,
        "single-math-v1-multi-turn": two + " | {ref_answer_1} | {ref_answer_2}",
    }
    return [
        {"name": name, "system_prompt": f"system {name}", "prompt_template": template}
        for name, template in templates.items()
    ]


def write(folder, rows):
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"name": "pair-v2"}]))
    return file


def test_prompts_of_a_file_are_used_as_they_are_and_named(tmp_path, monkeypatch):
    plain, math = answered()
    read = read_prompts(write(tmp_path, prompt_rows()))
    system, user = (message["content"] for message in read.messages(*math, 2))
    assert system == "system single-math-v1-multi-turn"
    assert user == "1 + 1? | answer {one} | Plus 1? | answer two | two | three"
    assert read.messages(*plain, 1)[1]["content"] == "Write. | answer {one}"
    assert "our wording" in OURS.label
    mark = digest(read.prompts)
    assert read.label == f"mtbench-single, prompts of mine.jsonl ({mark[:12]})"
    monkeypatch.setattr(prompts_module, "_PUBLISHED", mark)
    rows = prompt_rows()
    assert read_prompts(write(tmp_path, rows)).label == "mtbench-single, published prompts"
    rows[0]["system_prompt"] += " "
    assert "published" not in read_prompts(write(tmp_path, rows)).label


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows[0].update(prompt_template="{question} {anwser}"),
        lambda rows: rows[3].update(prompt_template="{question"),
        lambda rows: rows[0].pop("system_prompt"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path, change):
    rows = prompt_rows()
    change(rows)
    with pytest.raises(DataError, match=r"mine.jsonl: not FastChat's prompts"):
        read_prompts(write(tmp_path, rows))
    (tmp_path / "mine.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"mine.jsonl: not FastChat's prompts"):
        read_prompts(tmp_path / "mine.jsonl")


def test_means_are_over_answers_and_leave_the_unrated_out():
    lines = [line for pair in answered() for line in pair]
    assert metric_names(lines) == ["score", "turn_1", "turn_2", "writing", "math"]
    words = ("[[2]]", "[[6]]", "[[10]]", "none")
    replies = [Reply(text, "stop", 1, 1) for text in words]
    rated = [graded(*each) for each in zip(lines, replies, strict=True)]
    assert [line["item"] for line in rated] == ["81/1", "81/2", "111/1", "111/2"]
    assert [line["target"] for line in rated] == [None, None, "two", "three"]
    assert rated[1]["scores"] == {"score": 6, "turn_2": 6, "writing": 6}
    assert (rated[3]["scores"], rated[3]["status"]) == ({}, "no rating")
    expected = {"score": 6.0, "turn_1": 6.0, "turn_2": 6.0, "writing": 4.0, "math": 10.0}
    assert means(rated) == expected
    assert means(rated[:1]) == {"score": 2.0, "turn_1": 2.0, "writing": 2.0}
    assert means(lines) == {}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"url": "http://x/v1"}, "`judge.model` is missing"),
        ({"model": "m"}, "`judge.url` is missing"),
        ({"url": "x", "model": "m"}, "`judge.url` is 'x'"),
        ({"url": "ftp://x", "model": "m"}, "`judge.url` is 'ftp://x'"),
        ({"url": "http://x:port/v1", "model": "m"}, "`judge.url` is 'http://x:port/v1'"),
        ({"url": "http://me:secret@x/v1", "model": "m"}, "not shown here"),
        ({"url": "http://x/v1?key=secret", "model": "m"}, "not shown here"),
        ({"timeout": 0}, "`judge.timeout` is 0"),
        ({"request": {"messages": []}}, "sets `judge.request.messages` itself"),
    ],
)
def test_bad_values_are_one_sentence_each_and_show_no_secret(fields, says):
    (said,) = JudgeConfig(**fields).faults()
    assert says in said
    assert "secret" not in said


def test_good_values_have_no_faults():
    for url in ("http://localhost:8000/v1", "https://api.openai.com/v1", "http://[::1]:80/v1/"):
        assert JudgeConfig(url=url, model="m").faults() == []
    assert JudgeConfig().faults() == []
