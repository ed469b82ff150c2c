import random

import pytest

from tlora.registry import TASKS
from tlora.runconfig import DataConfig
from tlora.tasks.contamination import Questions, _places, _said_in
from tlora.tasks.passages import SURE_WORDS, Passages, Texts
from tlora.tasks.wording import TOKEN, folded

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


def asks(text, *questions):
    return Questions(questions).places([text]) == [0]


@pytest.mark.parametrize("around", AROUND)
def test_a_question_is_found_within_any_text(around):
    for spelled in (ASKED, ASKED.upper(), ASKED.replace(" ", "\n")):
        assert asks(around.format(spelled), ASKED)


@pytest.mark.parametrize(
    "other",
    [
        ASKED.replace("left", "sold"),
        ASKED.replace("12", "13"),
        ASKED.replace("eats one", "eats one and gives two away"),
        ASKED.removesuffix("How many are left?"),
        ASKED.removesuffix("left?"),
        ASKED.removeprefix("Anna "),
        ASKED.replace("Anna", "Hanna"),
        ASKED.replace("left", "leftover"),
    ],
)
def test_a_question_that_shares_a_part_is_another(other):
    for around in AROUND:
        assert not asks(around.format(other), ASKED)


def test_a_short_question_that_goes_on_is_another():
    asked = "Write a Python function to calculate the factorial of a number"
    for rest in ("", ".", ". Be brief.", "\nBe brief.", ": 6", " (6)", "[/INST]"):
        assert asks(f"Q: {asked}{rest}", asked)
        assert asks(f"Q: {asked}{rest}", f"{asked}.")
    assert not asks(f"Q: {asked} using recursion.", asked)
    asked = f"{asked} and of the one after it"
    assert asks(f"Q: {asked} using recursion.", asked)


def test_symbols_count_inside_a_text_too():
    asked = "What is the greatest integer n for which 7 - n exceeds 5?"
    assert asks(f"Q: {asked} A:", asked)
    assert not asks(f"Q: {asked.replace('-', '+')} A:", asked)
    assert asks(f"Q: $-{asked} A:", f"-{asked}")
    assert not asks(f"Q: {asked} A:", f"-{asked}")


def test_a_number_is_not_cut():
    asked = "What is the sum of all of the numbers 4 and 3"
    assert asks(f"Q: {asked}. 5 is wrong.", asked)
    for rest in ("5", ".5", "/4", ",000", "^2"):
        assert not asks(f"Q: {asked}{rest}", asked)
    asked = "3 is the least of all of the numbers in which set?"
    assert asks(f"Q: {asked}", asked)
    for rest in ("1", "1.", "2/"):
        assert not asks(f"Q: {rest}{asked}", asked)


def test_short_questions_are_compared_as_a_whole():
    for asked in ("What is 2 + 2?", "a b c d e f g h i"):
        assert asks(asked, asked)
        assert not asks(f"Q: {asked}", asked)


def test_questions_with_a_common_beginning_and_end_are_told_apart():
    form = "Please answer the following question with true or false: is {} odd? Answer: true/false"
    known = Passages(form.format(n) for n in range(0, 6000, 2))
    texts = Texts([f"Do it. {form.format(n)}" for n in range(100)])
    assert known.places(texts) == list(range(0, 100, 2))


def by_the_definition(passage, text):
    """Whether the words and symbols of a passage are a run of the text's."""
    one, other = TOKEN.findall(folded(passage)), TOKEN.findall(folded(text))
    return any(other[n : n + len(one)] == one for n in range(len(other) - len(one) + 1))


def test_what_is_found_is_what_the_definition_says():
    drawn = random.Random(0)
    words = ["Äpfel", "+", "-", "猫dog", "e\u0301tude", "…", "house", "$", "ﬁne", "tree-top"]

    def some(count):
        return " ".join(drawn.choice(words) for _ in range(count))

    found = 0
    for _ in range(300):
        passage = f"{some(20)} {' house' * SURE_WORDS}"
        cut = passage.split()
        cut[drawn.randrange(len(cut))] = drawn.choice(words)
        texts = [
            f"{some(drawn.randrange(9))} {' '.join(cut)} {some(drawn.randrange(9))}",
            some(drawn.randrange(60)),
            f"{some(3)} {passage} {some(4)}",
        ]
        expected = [n for n, text in enumerate(texts) if by_the_definition(passage, text)]
        assert Passages([passage]).places(Texts(texts)) == expected
        found += len(expected)
    assert 300 < found < 450


def test_the_text_that_asks_is_named_wherever_it_stands_in_a_portion(monkeypatch):
    monkeypatch.setattr("tlora.tasks.contamination._PORTION_ROWS", 7)
    texts = ["", "of no interest", *["x"] * 30]
    for place in (2, 6, 7, 13, 31):
        texts[place] = f"Q: {ASKED}"
    assert Questions([ASKED]).places(texts) == [2, 6, 7, 13, 31]


def found_in(row, task="jsonl", **data):
    made = TASKS.load(task)(DataConfig(**data))
    return _places({"e": Questions([ASKED])}, [(("not", "asked"), _said_in(row, made))])["e"] == [0]


def test_all_that_a_row_says_is_looked_through():
    def turns(*said):
        return {"messages": [{"role": role, "content": content} for role, content in said]}

    assert found_in({"prompt": f"Q: {ASKED}", "response": "5"})
    assert found_in({"prompt": "Make up a question.", "response": f"Well: {ASKED}"})
    assert found_in({"text": f"{ASKED}\n5"})
    assert found_in(turns(("user", f"{ASKED} Think."), ("assistant", "5")))
    assert found_in(turns(("system", ASKED), ("user", "Go on."), ("assistant", "5")))
    assert found_in(turns(("user", [{"type": "text", "text": f"{ASKED} Think."}])))
    one, other = ASKED.split("--")
    assert found_in(turns(("user", one), ("assistant", "And?"), ("user", other)))
    assert not found_in(turns(("user", one), ("assistant", "And?"), ("user", one)))


def test_texts_that_are_classified_are_compared_as_a_whole():
    assert not found_in({"text": f"{ASKED} Nobody knows.", "text_pair": None, "label": 1})
    row = {"prompt": f"cola sentence: {ASKED} Nobody knows.", "response": "acceptable"}
    assert not found_in(row, "cola", kind="seq2seq")
