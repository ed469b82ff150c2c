import json

import pytest

from tlora.errors import DataError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.gsm8k import Gsm8k, worked_answer

ANSWER = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


def test_the_answer_loses_its_annotations_and_ends_in_the_scored_sentence():
    assert worked_answer(ANSWER) == (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May.\nThe answer is: 72"
    )


@pytest.mark.parametrize(
    ("final", "number"),
    [("#### 1,024", "1024"), ("#### -3", "-3"), ("####5", "5"), ("#### 0.5 \n", "0.5")],
)
def test_the_number_is_taken_without_its_thousands_commas(final, number):
    assert worked_answer(f"So.\n{final}") == f"So.\nThe answer is: {number}"


def test_an_answer_without_a_final_line_names_file_row_and_column():
    with pytest.raises(DataError, match=r"^train, row 3: column 'answer': .*'#### number'"):
        Gsm8k(DataConfig()).row({"question": "2+2?", "answer": "4"}, "train, row 3")


def test_the_prompt_is_the_papers():
    row = Gsm8k(DataConfig()).row({"question": " How many? ", "answer": ANSWER}, "row 1")
    assert row["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nHow many?\n\n### Response:"
    )


def test_rows_are_drawn_from_the_whole_file_with_a_seed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"question": f"{n:02}?", "answer": ANSWER}) + "\n" for n in range(90))
    )

    def drawn(**fields):
        parts = Gsm8k(DataConfig(**fields)).load(str(file), str(file))
        return [[row["question"] for row in rows] for rows in parts]

    first, held_out = drawn(max_train_rows=20, max_eval_rows=20, subset_seed=0)
    assert first == held_out == sorted(set(first))
    assert len(first) == 20
    assert min(first) < "30?" and max(first) > "60?"
    assert drawn(max_train_rows=20, subset_seed=0)[0] == first
    assert drawn(max_train_rows=20, subset_seed=1)[0] != first
    assert len(drawn(max_train_rows=20, subset_seed=1)[1]) == 90
    assert [*DataConfig(subset_seed=1).undrawn()] == [
        "`data.subset_seed` chooses rows at random but not how many; set `data.max_train_rows` or"
        " `data.max_eval_rows` too."
    ]
