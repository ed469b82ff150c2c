"""Questions, prompts, grades, means and the lines on disk, without a judge and without a model."""

import json
import string

import pytest

from tlora.errors import ArtifactError, DataError
from tlora.scoring.mtbench import prompts as prompts_module
from tlora.scoring.mtbench.config import JudgeConfig
from tlora.scoring.mtbench.endpoint import Reply
from tlora.scoring.mtbench.grades import from_lines, means, metric_names, to_lines
from tlora.scoring.mtbench.judging import Answered, Judged, Judgement
from tlora.scoring.mtbench.prompts import OURS, digest, rating, read_prompts
from tlora.scoring.mtbench.questions import (
    NEEDS_REFERENCE,
    Question,
    json_lines,
    published_temperature,
    read_questions,
    with_references,
)

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again, in {braces}."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Plus 1?"], "reference": ["x"]},
]
REFERENCES = [{"question_id": 111, "choices": [{"index": 0, "turns": ["two", "three"]}]}]


def write(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    file = write(tmp_path / "question.jsonl", [*QUESTIONS, ""])
    references = json_lines(write(tmp_path / "gpt-4.jsonl", REFERENCES))
    return with_references(read_questions(json_lines(file)), references)


def test_questions_are_read_with_the_references_that_their_category_needs(questions):
    assert questions == [
        Question("81", "writing", ("Write.", "Again, in {braces}.")),
        Question("111", "math", ("1 + 1?", "Plus 1?"), ("two", "three")),
    ]


def test_a_line_separator_inside_a_question_does_not_end_it(tmp_path):
    row = QUESTIONS[0] | {"turns": ["a\u2028b\x85c", "d"]}
    file = write(tmp_path / "q.jsonl", [])
    file.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_questions(json_lines(file))[0].turns[0] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object but list"),
        ({"question_id": 1, "category": "math"}, "line 2: a question has"),
        (QUESTIONS[0] | {"question_id": 1, "turns": ["one"]}, "line 2: a question has"),
        (QUESTIONS[0] | {"question_id": None}, "`question_id` is None"),
        (QUESTIONS[0], "line 2: question 81 comes twice"),
    ],
)
def test_a_bad_question_is_named_by_its_line(tmp_path, row, says):
    with pytest.raises(DataError, match=says):
        read_questions(json_lines(write(tmp_path / "q.jsonl", [QUESTIONS[0], row])))


def test_missing_files_and_references_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: cannot be read"):
        read_questions(json_lines(tmp_path / "nothing.jsonl"))
    questions = read_questions(json_lines(write(tmp_path / "q.jsonl", QUESTIONS)))
    with pytest.raises(DataError, match="no reference answer to the questions 111"):
        with_references(questions, [])
    with pytest.raises(DataError, match="line 1: `choices` holds no answer to two turns"):
        bad = write(tmp_path / "r.jsonl", [{"question_id": 1}])
        with_references(questions, json_lines(bad))


def test_the_published_temperatures():
    found = {
        name: published_temperature(Question("1", name, ("a", "b")))
        for name in ("writing", "roleplay", "extraction", "math", "coding", "reasoning", "stem")
    }
    assert found == {
        "writing": 0.7,
        "roleplay": 0.7,
        "stem": 0.1,
        **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    }
    assert {"math", "reasoning", "coding"} == NEEDS_REFERENCE


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
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_a_grade_is_read_as_published(text, number):
    assert rating(text) == number


def fields_of(prompt):
    return {name for _, name, _, _ in string.Formatter().parse(prompt.template) if name}


def test_our_prompts_show_all_that_the_published_ones_show():
    assert OURS.prompts.keys() == prompts_module._FIELDS.keys()
    for key, prompt in OURS.prompts.items():
        assert fields_of(prompt) == prompts_module._FIELDS[key]
        assert "from 1 (useless) to 10" in prompt.system
        assert rating(prompt.system) == 4  # the example is of the form that is read
        assert ("reference" in prompt.system) == key[1]
        assert ("second request alone" in prompt.system) == (key[0] == 2)


def test_messages_hold_the_turn_the_conversation_and_the_references(questions):
    plain, maths = questions
    said = ("answer {one}", "answer two")
    first, second = (OURS.messages(plain, said, turn) for turn in (1, 2))
    assert [m["role"] for m in first] == ["system", "user"]
    assert "answer {one}" in first[1]["content"]
    assert "answer two" not in first[1]["content"]
    places = [second[1]["content"].index(t) for t in ("Write.", said[0], "Again, in {b", said[1])]
    assert places == sorted(places)
    first, second = (OURS.messages(maths, said, turn)[1]["content"] for turn in (1, 2))
    assert "two" in first.replace("answer two", "")
    assert "three" not in first
    assert "three" in second


def prompt_rows():
    names = prompts_module._NAMES
    return [
        {
            "name": names[key],
            "type": "single",
            "system_prompt": f"system {key}",
            "prompt_template": " | ".join(f"{{{field}}}" for field in sorted(fields)),
            "output_format": "[[rating]]",
        }
        for key, fields in prompts_module._FIELDS.items()
    ]


def test_prompts_of_a_file_are_used_as_they_are(tmp_path, questions):
    file = write(tmp_path / "mine.jsonl", [{"name": "pair-v2"}, *prompt_rows()])
    read = read_prompts(file)
    message = read.messages(questions[1], ("A", "B"), 2)
    assert message[0]["content"] == "system (2, True)"
    assert message[1]["content"] == "A | B | 1 + 1? | Plus 1? | two | three"
    assert read.messages(questions[0], ("A", "B"), 1)[1]["content"] == "A | Write."


def test_a_result_says_whose_wording_it_was(tmp_path, monkeypatch):
    assert "our wording" in OURS.label
    rows = prompt_rows()
    read = read_prompts(write(tmp_path / "mine.jsonl", rows))
    mark = digest(read.prompts)
    assert "mine.jsonl" in read.label
    assert mark[:12] in read.label
    assert "published" not in read.label
    monkeypatch.setattr(prompts_module, "_PUBLISHED", mark)
    assert read_prompts(tmp_path / "mine.jsonl").label == "mtbench-single, published prompts"
    rows[0]["system_prompt"] += " "
    assert "published" not in read_prompts(write(tmp_path / "mine.jsonl", rows)).label


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(), "no prompt single-math-v1-multi-turn"),
        (lambda rows: rows[0].update(prompt_template="{question} {anwser}"), "fields.*anwser"),
        (lambda rows: rows[0].update(prompt_template="{question"), "cannot be filled in"),
        (lambda rows: rows[0].update(output_format="[[A]]"), "line 1: `output_format`"),
        (lambda rows: rows[0].pop("system_prompt"), "line 1: a prompt has"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path, change, says):
    rows = prompt_rows()
    change(rows)
    with pytest.raises(DataError, match=says):
        read_prompts(write(tmp_path / "mine.jsonl", rows))


def judged(*pairs):
    def one(score):
        return Judgement(score, "rated" if score else "no rating", Reply("words", "stop", 1, 1))

    return Judged([(one(a), one(b)) for a, b in pairs], asked=0, retried=0)


def answered(questions):
    return [Answered(q, (f"one of {q.id}", f"two of {q.id}"), ("p1", "p2")) for q in questions]


def test_means_are_over_answers_and_leave_the_unrated_out(questions):
    some = answered(questions)
    assert metric_names(some) == ["score", "turn_1", "turn_2", "writing", "math"]
    found = means(some, judged((2.0, 6.0), (10.0, None)))
    assert found == {"score": 6.0, "turn_1": 6.0, "turn_2": 6.0, "writing": 4.0, "math": 10.0}
    assert means(some, judged((None, 6.0), (None, None))) == {
        "score": 6.0,
        "turn_2": 6.0,
        "writing": 6.0,
    }


def test_lines_hold_all_that_a_later_judging_needs(questions):
    some = answered(questions)
    for grades in (None, judged((2.0, 6.0), (10.0, None))):
        lines = json.loads(json.dumps(to_lines(some, grades)))
        assert from_lines(lines, "file") == some
        assert [line["item"] for line in lines] == ["81/1", "81/2", "111/1", "111/2"]
        assert [line["group"] for line in lines] == ["81", "81", "111", "111"]
        assert [line["target"] for line in lines] == [None, None, "two", "three"]
    assert [line["scores"] for line in lines] == [
        {"score": 2, "turn_1": 2, "writing": 2},
        {"score": 6, "turn_2": 6, "writing": 6},
        {"score": 10, "turn_1": 10, "math": 10},
        {},
    ]
    assert lines[3]["status"] == "no rating"
    assert all(line["scores"] == {} for line in to_lines(some))


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines.pop(),
        lambda lines: lines.reverse(),
        lambda lines: lines.pop(0) and lines.pop(),
        lambda lines: lines[0].pop("reply"),
    ],
)
def test_lines_that_are_no_answers_are_refused(questions, damage):
    lines = to_lines(answered(questions))
    damage(lines)
    with pytest.raises(ArtifactError, match="file: these are no answers to MT-Bench"):
        from_lines(lines, "file")


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
        ({"concurrency": 0}, "`judge.concurrency` is 0"),
        ({"timeout": 0}, "`judge.timeout` is 0"),
        ({"retries": -1}, "`judge.retries` is -1"),
        ({"price_in": 1.0}, "give both of"),
        ({"request": {"messages": []}}, "`judge.request.messages` is set"),
    ],
)
def test_bad_values_are_one_sentence_each_and_show_no_secret(fields, says):
    faults = JudgeConfig(**fields).faults()
    assert len(faults) == 1
    assert says in faults[0]
    assert "secret" not in faults[0]


def test_good_values_have_no_faults():
    for url in ("http://localhost:8000/v1", "https://api.openai.com/v1", "http://[::1]:80/v1/"):
        assert JudgeConfig(url=url, model="m", price_in=0.0, price_out=1.5).faults() == []
    assert JudgeConfig().faults() == []
