import itertools
import json
import random
import unicodedata

import pytest
from datasets import Dataset

from tlora.errors import ConfigError, DataError
from tlora.registry import TASKS
from tlora.tasks.base import INSTRUCTION_PROMPT
from tlora.tasks.contamination import PromptIndex, overlapping_rows, prompt_of, refuse_overlap
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.normalize import normalize
from tlora.training.setup import guarded

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


def found(prompts, texts):
    """The indices of the texts that are or contain a prompt."""
    known = PromptIndex(prompts)
    return [n for n, text in enumerate(texts) if known.repeated_in(text, [text])]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spelling_that_does_not_count(one, other):
    assert found([other], [one]) == found([one], [other]) == [0]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_symbols_and_order_that_count(one, other):
    assert found([other], [one]) == found([one], [other]) == []


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


def test_texts_are_normalized_as_the_definition_says():
    pieces = ["a", "B", "-", " ", "1", ".", "+", "--", "é", "_"]
    texts = ["".join(chosen) for n in (2, 3) for chosen in itertools.product(pieces, repeat=n)]
    for text in texts:
        assert normalize(text) == (by_the_definition(text) or [text.strip()])


def test_the_texts_of_a_pair_are_kept_apart_and_in_order():
    known = PromptIndex([("a b", "c")])
    assert known.repeated_in(("A b.", "c"))
    for other in (("a", "b c"), ("c", "a b"), "a b c"):
        assert not known.repeated_in(other)


ASKED = "Anna has 12 apples, eats one -- and sells half of the rest. How many are left?"
AROUND = [
    "{}",
    "Question: {}\nAnswer:",
    "Question: {} Answer: 5",
    "<s>[INST]{}[/INST]",
    "**{}**\n\nPlease reason step by step.",
    "Frage („{}“): löse sie, bitte ☺",
    "1. {}\n2. And now?",
]


ONE, OTHER = ASKED.split("--")


def turns(*said):
    return [{"role": role, "content": content} for role, content in said]


@pytest.mark.parametrize("around", AROUND)
def test_a_long_prompt_is_found_within_any_text(around):
    texts = [around.format(s) for s in (ASKED, ASKED.upper(), ASKED.replace(" ", "\n"))]
    assert found([ASKED], texts) == [0, 1, 2]


@pytest.mark.parametrize(
    "other",
    [
        ASKED.replace("left", "sold"),
        ASKED.replace("12", "13"),
        ASKED.replace("eats one", "eats one and gives two away"),
        ASKED.removesuffix("left?"),
        ASKED.removeprefix("Anna "),
        ASKED.replace("Anna", "Hanna"),
        ASKED.replace("half", "-half"),
    ],
)
def test_a_prompt_that_shares_some_ngrams_is_another(other):
    assert not found([ASKED], [around.format(other) for around in AROUND])


def test_every_13_gram_has_to_be_there_and_none_but_those():
    drawn = random.Random(0)
    words = ["Äpfel", "+", "-", "猫dog", "e\u0301tude", "house", "$", "ﬁne"]

    def some(count):
        return [drawn.choice(words) for _ in range(count)]

    def grams(text):
        tokens = normalize(text)
        return {tuple(tokens[n : n + 13]) for n in range(len(tokens) - 12)}

    contained = 0
    for _ in range(100):
        prompt = some(drawn.randrange(14, 30))
        changed = [*prompt]
        changed[drawn.randrange(len(prompt))] = drawn.choice(words)
        parts = (some(drawn.randrange(9)), drawn.choice([prompt, changed]), some(5))
        text = " ".join(word for part in parts for word in part)
        expected = grams(" ".join(prompt)) <= grams(text)
        assert found([" ".join(prompt)], [text]) == [0] * expected
        contained += expected
    assert 30 < contained < 80


def test_short_prompts_and_pairs_are_compared_as_a_whole():
    for asked in ("What is 2 + 2?", "a b c d e f g h i j k l", (ASKED, ASKED)):
        known = PromptIndex([asked])
        assert known.repeated_in(asked)
        texts = [asked] if isinstance(asked, str) else list(asked)
        assert not known.repeated_in("other", [f"Q: {text}" for text in texts])


def test_prompts_of_one_template_are_told_apart():
    form = "Please answer the following question with true or false: is {} odd? Answer: true/false"
    asked = [form.format(n) for n in range(0, 200, 2)]
    texts = [f"Do it. {form.format(n)}" for n in range(20)]
    assert found(asked, texts) == list(range(0, 20, 2))


@pytest.mark.parametrize(
    ("row", "prompt"),
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
def test_the_prompt_of_a_row_is_without_the_answer(row, prompt):
    assert prompt_of(row) == prompt


def raw(*asked):
    return Dataset.from_list(
        [{"prompt": text, "response": f"r{n}"} for n, text in enumerate(asked)]
    )


def task(rows, overlap="refuse"):
    made = TASKS.load("jsonl")(DataConfig(overlap=overlap))
    made.settle_columns(rows.column_names)
    return made


def left_out(rows, others, task, name="t"):
    """What is left out of raw training rows, where others are raw rows or prompts."""
    known = {
        other: found
        if isinstance(found, PromptIndex)
        else PromptIndex(map(prompt_of, task.rows(found, other)))
        for other, found in others.items()
    }
    return overlapping_rows(task.rows(rows, name), known, task, name)


TRAIN = raw("a", "b", "c", "B?", "d")


def test_rows_that_are_asked_are_refused_with_count_and_places():
    with pytest.raises(DataError) as caught:
        left_out(TRAIN, {"e.jsonl": raw("b", "x"), "v.jsonl": raw("D!")}, task(TRAIN), "t.jsonl")
    message = str(caught.value)
    assert message.startswith(
        "t.jsonl: of 5 training rows, 2 repeat a prompt of e.jsonl (rows 2, 4); 1 repeats a prompt"
        " of v.jsonl (row 5); "
    )
    assert "--data.overlap drop" in message
    assert "--data.overlap allow" in message


def test_many_rows_are_counted_and_five_named():
    many = raw(*"abcdefgh")
    with pytest.raises(DataError, match=r"\(rows 1, 2, 3, 4, 5 and 3 more\)"):
        left_out(many, {"e": many}, task(many))


def test_dropped_rows_are_those_that_are_asked(caplog):
    assert left_out(TRAIN, {"e": raw("b", "x")}, task(TRAIN, "drop")) == [1, 3]
    assert "2 repeat a prompt of e (rows 2, 4); training skips them" in caplog.text
    with pytest.raises(DataError, match="every training row repeats an evaluation row"):
        left_out(TRAIN, {"e": TRAIN}, task(TRAIN, "drop"))


def test_allowed_rows_stay_and_are_reported(caplog):
    assert left_out(TRAIN, {"e": raw("b")}, task(TRAIN, "allow")) == []
    assert "2 repeat a prompt of e (rows 2, 4); training uses them anyway" in caplog.text


def test_validation_rows_may_not_repeat_what_is_reported():
    known = ("e", PromptIndex(["b"]))
    rows = [{"prompt": text, "response": ""} for text in "abc"]
    with pytest.raises(
        DataError, match=r"v: of 3 validation rows, 1 repeats a prompt of e \(row 2"
    ):
        refuse_overlap(rows, known, task(TRAIN, "drop"), "v")
    refuse_overlap(rows, known, task(TRAIN, "allow"), "v")
    refuse_overlap(rows[:1], known, task(TRAIN, "drop"), "v")


GSM8K = [
    {
        "question": f"Anna has {n} red apples and eats one of them. How many are left?",
        "answer": f"#### {n - 1}",
    }
    for n in range(1, 5)
]


@pytest.fixture
def guarding(tmp_path):
    """A folder with a test file of GSM8K's, to be guarded against."""
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    return str(tmp_path)


def test_rows_are_kept_apart_from_what_a_named_evaluation_asks(guarding):
    data = DataConfig(guard="gsm8k-paper", guard_dir=guarding)
    rows = Dataset.from_list([{**GSM8K[2], "question": GSM8K[2]["question"].upper()}, *NEW])
    known = guarded(data)
    assert list(known) == ["gsm8k-paper"]
    with pytest.raises(
        DataError, match=r"of 3 training rows, 1 repeats a prompt of gsm8k-paper \(row 1\)"
    ):
        left_out(rows, known, TASKS.load("gsm8k")(data))
    assert left_out(rows, known, TASKS.load("gsm8k")(DataConfig(overlap="drop"))) == [0]


NEW = [{"question": f"new {n}", "answer": "#### 1"} for n in (1, 2)]


def test_what_cannot_be_guarded_against_is_refused_at_once(guarding):
    with pytest.raises(ConfigError) as caught:
        guarded(DataConfig(guard="gsm8k-papr,humaneval-paper", guard_dir=guarding))
    assert "Did you mean 'gsm8k-paper'?" in str(caught.value)
    assert "'humaneval-paper' has its own wording" in str(caught.value)
    with pytest.raises(DataError, match="math-paper"):
        guarded(DataConfig(guard="math-paper", guard_dir=guarding))
    assert guarded(DataConfig()) == {}


@pytest.mark.parametrize(
    ("row", "contains"),
    [
        ({"prompt": f"Q: {ASKED}", "response": "5"}, True),
        ({"prompt": "Make up a question.", "response": f"Well: {ASKED}"}, True),
        ({"text": f"{ASKED}\n5"}, True),
        ({"messages": turns(("user", f"{ASKED} Think."), ("assistant", "5"))}, True),
        ({"messages": turns(("system", ASKED), ("user", "Go."), ("assistant", "5"))}, True),
        ({"messages": turns(("user", [{"type": "text", "text": f"{ASKED} Think."}]))}, True),
        ({"messages": turns(("user", ONE), ("assistant", "And?"), ("user", OTHER))}, True),
        ({"messages": turns(("user", ONE), ("assistant", "And?"), ("user", ONE))}, False),
        ({"text": f"{ASKED} Nobody knows.", "text_pair": None, "label": 1}, False),
    ],
)
def test_all_that_a_row_says_is_looked_through_but_for_labeled_texts(row, contains):
    made = TASKS.load("jsonl")(DataConfig(overlap="drop"))
    rows = [{"text": "another"}, row]
    assert overlapping_rows(rows, {"e": PromptIndex([ASKED])}, made, "t") == [1] * contains


def test_texts_put_to_be_classified_are_compared_as_a_whole():
    made = TASKS.load("cola")(DataConfig(kind="seq2seq"))
    row = {"prompt": f"cola sentence: {ASKED} Nobody knows.", "response": "acceptable"}
    assert overlapping_rows([row], {"e": PromptIndex([ASKED])}, made, "t") == []
