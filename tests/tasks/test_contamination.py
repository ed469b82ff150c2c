import itertools
import json
import logging
import unicodedata

import pytest
from datasets import Dataset

from tlora.errors import ConfigError, DataError
from tlora.registry import TASKS
from tlora.runconfig import DataConfig
from tlora.stages.setup import guarded
from tlora.tasks.base import INSTRUCTION_PROMPT
from tlora.tasks.contamination import Questions, keep_apart, question_of, questions

SAME = [
    ("What is 2 + 2?", "  what is\t2+2 "),
    ("He said: “no”…", 'he said "no"'),
    ("a box-office hit -- he said", "A box office hit — he said"),
    ("isn't", "isn\u2019t"),
    ("ﬁne STRASSE", "fine straße"),
    ("snake_case", "snake case"),
    ("...", " ... "),
]
DIFFERENT = [
    ("What is 5 - 3?", "What is 5 + 3?"),
    ("What is -3?", "What is 3?"),
    ("cos(-150)", "cos(150)"),
    ("f(x-1)", "f(x 1)"),
    ("2 5", "25"),
    ("(1 + 2) * 3", "1 + 2 * 3"),
    ("x > 3", "x < 3"),
    ("x ≤ 3", "x ≥ 3"),
    ("one two", "two one"),
    ("猫", "犬"),
    ("?", "!"),
    ("", "a"),
    ("$5", "£5"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spelling_that_does_not_count(one, other):
    assert one in Questions([other])
    assert other in Questions([one])


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_symbols_and_order_that_count(one, other):
    assert one not in Questions([other])
    assert other not in Questions([one])


def by_the_definition(text):
    """The words and symbols of a text, character by character."""
    text = unicodedata.normalize("NFKC", text).casefold()
    tokens, word = [], ""
    for place, character in enumerate(f"{text} "):
        if character.isalnum():
            word += character
            continue
        tokens += [word] if word else []
        word = ""
        before, after = text[place - 1 : place], text[place + 1 : place + 2]
        dash = character == "-" and (
            "-" in (before, after) or (before.isalpha() and after.isalpha())
        )
        if character.strip(" .,;:!?_'\"") and not dash:
            tokens.append(character)
    return tokens


def test_questions_are_told_apart_as_the_definition_tells_them():
    pieces = ["a", "B", "-", " ", "1", ".", "+", "--", "é", "_"]
    texts = ["".join(chosen) for n in (2, 3) for chosen in itertools.product(pieces, repeat=n)]
    texts = [text for text in texts if by_the_definition(text)]
    forms = {text: tuple(by_the_definition(text)) for text in texts}
    for text in texts[::37]:
        alike = {other for other in texts if other in Questions([text])}
        assert alike == {other for other in texts if forms[other] == forms[text]}


def test_the_texts_of_a_pair_are_kept_apart_and_in_order():
    known = Questions([("a b", "c")])
    assert ("A b.", "c") in known
    assert ("a", "b c") not in known
    assert ("c", "a b") not in known
    assert "a b c" not in known


def test_places_are_those_of_the_questions_that_are_known():
    assert Questions(["b", "d"]).places(iter(["a", "B?", "c", "d", "b"])) == [1, 3, 4]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "Ask:", "response": "4"}, "Ask:"),
        ({"prompt": INSTRUCTION_PROMPT.format(instruction="Add."), "response": "4"}, "Add."),
        ({"text": "a", "text_pair": None, "label": 1}, "a"),
        ({"text": "a", "text_pair": "b", "label": 1}, ("a", "b")),
        ({"text": "a whole text"}, "a whole text"),
        (
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "one"},
                    {"role": "assistant", "content": "1"},
                    {"role": "user", "content": [{"type": "text", "text": "two"}]},
                    {"role": "assistant", "content": "2"},
                ]
            },
            "one\ntwo",
        ),
    ],
)
def test_the_question_of_a_row_is_without_the_answer(row, question):
    assert question_of(row) == question


def test_the_items_of_an_evaluation_are_recognised_in_the_rows_of_its_task(tmp_path):
    from tlora.evaluation.harness.catalogue import build

    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    lines = [{"question": f"What is {n} + 1?", "answer": f"So.\n#### {n + 1}"} for n in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = build(["gsm8k-paper"], str(tmp_path))["gsm8k-paper"]
    asked = Questions(question_of(doc) for doc in evaluation.test_docs())
    gsm8k = TASKS.load("gsm8k")(DataConfig())
    others = [line | {"question": line["question"].replace("+", "-")} for line in lines]
    rows = Dataset.from_list([others[0], lines[2], others[3], lines[0]])
    assert asked.places(questions(rows, gsm8k, "t")) == [1, 3]


def raw(*asked):
    return Dataset.from_list(
        [{"prompt": text, "response": f"r{n}"} for n, text in enumerate(asked)]
    )


def task(rows, overlap="refuse"):
    made = TASKS.load("jsonl")(DataConfig(overlap=overlap))
    made._settle_columns(rows.column_names)
    return made


TRAIN = raw("a", "b", "c", "B?", "d")


def test_rows_that_are_asked_are_refused_with_count_and_places():
    with pytest.raises(DataError) as caught:
        keep_apart(TRAIN, {"e.jsonl": raw("b", "x"), "v.jsonl": raw("D!")}, task(TRAIN), "t.jsonl")
    message = str(caught.value)
    assert message.startswith(
        "t.jsonl: of 5 training rows 2 ask what e.jsonl asks (rows 2, 4); 1 ask what v.jsonl asks"
        " (row 5); "
    )
    assert "--data.overlap drop" in message
    assert "--data.overlap allow" in message


def test_many_rows_are_counted_and_five_named():
    many = raw(*"abcdefgh")
    with pytest.raises(DataError, match=r"8 ask what e asks \(rows 1, 2, 3, 4, 5 and 3 more\)"):
        keep_apart(many, {"e": many}, task(many), "t")


def test_dropped_rows_are_those_that_are_asked(caplog):
    others = {"e": raw("b", "x"), "v": None}
    kept = keep_apart(TRAIN, others, task(TRAIN, "drop"), "t")
    assert kept["response"][:] == ["r0", "r2", "r4"]
    assert "2 ask what e asks (rows 2, 4); they are left out of training" in caplog.text
    with pytest.raises(DataError, match="every training row is also an evaluation row"):
        keep_apart(TRAIN, {"e": TRAIN}, task(TRAIN, "drop"), "t")


def test_allowed_rows_stay_and_are_reported(caplog):
    kept = keep_apart(TRAIN, {"e": raw("b")}, task(TRAIN, "allow"), "t")
    assert kept[:] == TRAIN[:]
    assert "2 ask what e asks (rows 2, 4); they are trained on" in caplog.text


@pytest.mark.parametrize("others", [{}, {"e": None}, {"e": raw("x")}])
def test_nothing_is_said_of_rows_that_are_apart(others, caplog):
    caplog.set_level(logging.DEBUG)
    assert keep_apart(TRAIN, others, task(TRAIN), "t")[:] == TRAIN[:]
    assert caplog.text == ""


def test_a_bad_row_is_named_by_its_number():
    rows = raw(*map(str, range(1200)))
    rows = rows.map(lambda row, n: {"response": None if n == 1100 else "r"}, with_indices=True)
    with pytest.raises(DataError, match=r"t\.jsonl, row 1101: column 'response'"):
        list(questions(rows, task(rows), "t.jsonl"))


GSM8K = [
    {"question": f"Anna has {n} apples and eats one. How many are left?", "answer": f"#### {n - 1}"}
    for n in range(1, 5)
]


@pytest.fixture
def guarding(tmp_path):
    """A folder with a test file of GSM8K's, to be guarded against."""
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return str(tmp_path)


@pytest.mark.parametrize("name", ["gsm8k-paper", "gsm8k-metamath"])
def test_rows_are_kept_apart_from_what_a_named_evaluation_asks(guarding, name):
    data = DataConfig(guard=name, guard_dir=guarding)
    rows = Dataset.from_list([{**GSM8K[2], "question": GSM8K[2]["question"].upper()}, *NEW])
    known = guarded(data)
    assert list(known) == [name]
    with pytest.raises(DataError, match=rf"of 3 training rows 1 ask what {name} asks \(row 1\)"):
        keep_apart(rows, known, TASKS.load("gsm8k")(data), "t.jsonl")
    dropping = TASKS.load("gsm8k")(DataConfig(overlap="drop"))
    assert keep_apart(rows, known, dropping, "t.jsonl")["question"][:] == ["new 1", "new 2"]


NEW = [{"question": f"new {n}", "answer": "#### 1"} for n in (1, 2)]


def test_instructions_of_any_task_are_compared_with_an_evaluations(guarding):
    rows = Dataset.from_list([{"instruction": GSM8K[0]["question"], "output": "0"}])
    known = guarded(DataConfig(guard=["gsm8k-paper"], guard_dir=guarding))
    with pytest.raises(DataError, match="1 ask what gsm8k-paper asks"):
        keep_apart(rows, known, TASKS.load("math")(DataConfig()), "t.json")


@pytest.mark.parametrize("form", ["template", "text", "chat"])
def test_a_guarded_question_is_found_in_whatever_form_it_is_trained_on(guarding, form):
    asked = GSM8K[1]["question"]
    template = {"prompt_template": "Question: {question}\nAnswer:", "response_column": "answer"}
    data = DataConfig(
        guard="gsm8k-paper", guard_dir=guarding, **(template if form == "template" else {})
    )
    turns = [f"{asked}\nPlease reason step by step.", "1"]
    row = {
        "template": {"question": asked, "answer": "1"},
        "text": {"text": f"Here is a riddle. {asked} The answer is 1."},
        "chat": {
            "messages": [
                {"role": role, "content": said}
                for role, said in zip(("user", "assistant"), turns, strict=True)
            ]
        },
    }[form]
    spared = json.loads(json.dumps(row).replace("eats one", "eats none"))
    rows = Dataset.from_list([spared, row])
    jsonl = TASKS.load("jsonl")(data)
    jsonl._settle_columns(rows.column_names)
    with pytest.raises(DataError, match=r"of 2 training rows 1 ask what gsm8k-paper asks \(row 2"):
        keep_apart(rows, guarded(data), jsonl, "t.jsonl")


def test_an_evaluation_row_is_found_inside_a_training_row():
    asked = GSM8K[0]["question"]
    rows, held_out = raw("a", f"{asked} Think first."), raw(asked)
    with pytest.raises(DataError, match=r"of 2 training rows 1 ask what e asks \(row 2\)"):
        keep_apart(rows, {"e": held_out}, task(rows), "t")
    assert keep_apart(held_out, {"e": rows}, task(rows), "t")[:] == held_out[:]


def test_what_cannot_be_guarded_against_is_refused_at_once(guarding):
    with pytest.raises(ConfigError) as caught:
        guarded(DataConfig(guard="gsm8k-papr,humaneval-paper", guard_dir=guarding))
    assert "Did you mean 'gsm8k-paper'?" in str(caught.value)
    assert "'humaneval-paper' asks for programs" in str(caught.value)
    with pytest.raises(DataError, match="math-paper"):
        guarded(DataConfig(guard="math-paper", guard_dir=guarding))
    assert guarded(DataConfig()) == {}
