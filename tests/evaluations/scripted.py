"""Every evaluation of ours in small: rows of its own form, replies that are right and wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from tlora.evaluate import records
from tlora.evaluations.utils import Doc
from tlora.registry import EVALUATIONS
from tlora.scoring.answers import MARK

Reply = Callable[[Doc], str]
_INDEX = TaskManager(
    include_path=str(Path(EVALUATIONS.load("gsm8k-paper")).parent), include_defaults=False
)


def harness_task(folder: Path, name: str) -> dict[str, Any]:
    """Write one row into ``folder``; return the YAML of a task of the harness that reads it."""
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"q": "1+1=", "a": "2"}) + "\n")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match"}],
    }


def config(name: str) -> dict[str, Any]:
    """Return what the YAML of an evaluation of ours says, functions by name."""
    return _INDEX.task_index[name].cfg


GROUPS = [name for name in EVALUATIONS.names() if "group" in config(name)]
NAMES = [name for name in EVALUATIONS.names() if name not in GROUPS]


class Scripted(LM):
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [self.reply(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        """Prefer the shortest continuation after the shortest context."""
        self.asked += [request.args for request in requests]
        return [(-float(len("".join(request.args))), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-float(len(request.args[0])) for request in requests]


def evaluated(tasks: dict[str, Any], model: Scripted, **options: Any) -> dict[str, Any]:
    """Return lm-evaluation-harness's results of ``tasks``; they survive JSON."""
    found = lm_eval.evaluate(
        model,
        {"tasks": tasks},
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        **options,
    )
    return json.loads(json.dumps(found, default=str))


def scores(task: Any, reply: Reply) -> tuple[dict[str, float], list[records.Record]]:
    """Return the scores of a task and the record of every item, if ``reply`` answers."""
    name = task.task_name
    found = evaluated({name: task}, Scripted(reply))
    results = records.metrics(found["results"][name])
    return results, records.records(task, found["samples"][name])


@dataclass
class Case:
    """One evaluation in small."""

    file: str
    rows: list[dict[str, Any]]
    right: list[Reply]
    """Each scores 1 by every metric."""
    wrong: list[Reply]
    """Each scores 0 by every metric."""
    training: Callable[[dict[str, Any]], dict[str, str]] | None = None
    """The training row of a test row; its prompt is the one that is asked."""
    opening: str = ""
    """What follows the training prompt, where the protocol begins the reply."""
    targets: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> str:
        """Write the rows where the evaluation looks for them; return the folder."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ".jsonl" in path.suffixes
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        data = (text if lines else json.dumps(self.rows)).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return str(folder)


def say(text: str) -> Reply:
    """Return a reply with the reference in the place of {}."""
    return lambda doc: text.replace("{}", doc["target"])


def off_by(step: int, text: str) -> Reply:
    """Return a reply with a number beside the reference."""
    return lambda doc: text.replace("{}", str(int(float(doc["target"])) + step))


GSM8K_ROWS = [
    {
        "question": "Ann has 3 pears and buys 1,021 more. How many has she?  ",
        "answer": "She has 3+1021=<<3+1021=1024>>1024 pears.\n#### 1,024",
    },
    {"question": "It was 2 degrees\nand fell by 7.", "answer": "2-7=<<2-7=-5>>-5\n#### -5"},
]


def _gsm8k(right: str, **values: Any) -> Case:
    from tlora.tasks.dataconfig import DataConfig
    from tlora.tasks.gsm8k import Gsm8k

    return Case(
        file="gsm8k/test.jsonl",
        rows=GSM8K_ROWS,
        right=[say(right), say(f"7 at first.\n{right}\n\n### Instruction:\n{MARK}9 #### 9")],
        wrong=[
            off_by(1, right),
            off_by(-10, right),
            lambda doc: right.replace("{}", doc["target"][:-1] + "0"),
            say(""),
            say("I do not know."),
        ],
        training=lambda raw: Gsm8k(DataConfig()).row(raw, "a test"),
        targets=["1024", "-5"],
        **values,
    )


MATH_ROWS = [
    {
        "problem": "What is half of one? ",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "unique_id": "test/algebra/1.json",
    },
    {
        "problem": "Which $x$ solve $x^2=2$?",
        "solution": "First \\boxed{1}, no: $x=\\boxed{\\pm\\sqrt{2}}$.",
        "unique_id": "test/algebra/2.json",
    },
]


def _math(file: str, replies: int | None = None) -> Case:
    from tlora.tasks.dataconfig import DataConfig
    from tlora.tasks.math import Math

    return Case(
        file=file,
        rows=MATH_ROWS,
        right=[
            say(f"So.\n{MARK}{{}}"),
            say(f"{MARK}7, no.\n{MARK}$\\boxed{{{{}}}}$.\n"),
            say(f"{MARK}{{}}\n\n### Instruction:\n{MARK}8"),
        ][:replies],
        wrong=[
            lambda doc: MARK + doc["target"].replace("2", "3"),
            lambda doc: f"{MARK}{doc['target']}{doc['target']}",
            say("{}"),
            say(""),
        ][:replies],
        training=lambda raw: Math(DataConfig()).row(
            {"query": raw["problem"], "response": raw["solution"]}, "a test"
        ),
        targets=["\\frac{1}{2}", "\\pm\\sqrt{2}"],
    )


def _choice(file: str, choices: str) -> Case:
    """The last choice is right in the first row and the first in the second."""
    from tlora.tasks.commonsense import Commonsense
    from tlora.tasks.dataconfig import DataConfig

    first, *_, last = choices.split("/")
    answer = "the correct answer is "
    return Case(
        file=file,
        rows=[
            {
                "instruction": f"Please choose: {text}\n\nAnswer format: {choices} ",
                "input": "",
                "output": answer + right,
                "answer": right,
            }
            for text, right in (("a?", last), ("b?", first))
        ],
        right=[say(answer + "{}"), say("{}, and not ... " + choices)],
        wrong=[
            lambda doc: answer + (first if doc["target"] == last else last),
            lambda doc: f"not {first if doc['target'] == last else last} but {doc['target']}",
            lambda doc: doc["target"].upper(),
            say(""),
        ],
        training=lambda raw: Commonsense(DataConfig()).row(raw, "a test"),
        targets=[last, first],
    )


def _word_problems(file: str) -> Case:
    from tlora.tasks.dataconfig import DataConfig
    from tlora.tasks.math import Math

    return Case(
        file=file,
        rows=[
            {"instruction": " Two and 2.5 ? ", "input": "", "output": "9", "answer": "4.5"},
            {"instruction": "Half of 2000?", "input": "", "output": "", "answer": "1000.0"},
        ],
        right=[say("It was 3. The answer is {}."), lambda doc: f"${float(doc['target']):,}"],
        wrong=[
            off_by(1, "The answer is {}."),
            lambda doc: str(float(doc["target"]) + 0.002),
            say("{}, not 3"),
            say("-{}"),
            say("none"),
            say(""),
        ],
        training=lambda raw: Math(DataConfig()).row(raw, "a test"),
        targets=["4.5", "1000.0"],
    )


def _aqua(file: str) -> Case:
    rows = _word_problems(file)
    rows.rows = [raw | {"answer": letter} for raw, letter in zip(rows.rows, "EA", strict=True)]
    rows.right = [say("the answer is ({})."), say("{} or B")]
    rows.wrong = [
        lambda doc: "ABCDE"[1 - "ABCDE".index(doc["target"])],
        say("Being right is {}"),
        lambda doc: doc["target"].lower(),
        say(""),
    ]
    rows.targets = ["E", "A"]
    return rows


BODY = "    if n == 0:\n        return 0.0\n    return n / 3"
HUMANEVAL_ROW = {
    "task_id": "Test/0",
    "prompt": 'import math\n\n\ndef third(n: int) -> float:\n    """A third of n."""\n',
    "entry_point": "third",
    "canonical_solution": f"{BODY}\n",
    "test": "def check(candidate):\n    assert abs(candidate(9) - 3) < 1e-6\n",
}
PLUS_ROW = HUMANEVAL_ROW | {
    "base_input": [[9]],
    "plus_input": [[0], [-9], [1], ["nine"]],
    "atol": 0,
    "contract": "",
}
MBPP_ROW = {
    "task_id": 11,
    "text": "Write a function to find a third. ",
    "code": f"def third(n):\r\n{BODY}",
    "test_setup_code": "",
    "test_list": ["assert third(9) == 3", "assert third(0) == 0"],
}


def _code(file: str, row: dict[str, Any], asked: str) -> Case:
    from tlora.tasks.base import INSTRUCTION_PROMPT

    function = f"def third(n):\n{BODY}"
    fenced = f"Here:\n\n```python\n{function}\n```\nIt divides.\n```\nthird(0) / 0\n```"
    return Case(
        file=file,
        rows=[row],
        right=[
            lambda doc: fenced,
            lambda doc: f"```\n{function}\n\nassert third(1) == 7\n```",
            lambda doc: f"{function}\nprint(third(None))",
        ],
        wrong=[
            lambda doc: "```python\ndef third(n):\n    return 3.1\n```",
            lambda doc: f"I would write {function}",
            lambda doc: "",
        ],
        training=lambda raw: {"prompt": INSTRUCTION_PROMPT.format(instruction=asked)},
    )


_SHOWN = HUMANEVAL_ROW["prompt"].strip()
_TESTS = "\n".join(MBPP_ROW["test_list"])


CASES: dict[str, Case] = {
    "gsm8k-paper": _gsm8k(f"Worked.\n{MARK}{{}}"),
    "gsm8k-metamath": _gsm8k(f"Worked.\n{MARK}{{}}", opening=" Let's think step by step."),
    "gsm8k-hashes": _gsm8k("Worked.\n#### {}"),
    "gsm8k-llm-adapters": _gsm8k("The answer is {}."),
    "math-paper": _math("math/test.jsonl"),
    "math500-paper": _math("math500/test.jsonl", replies=1),
    "humaneval-paper": _code(
        "code/HumanEval.jsonl.gz",
        HUMANEVAL_ROW,
        f"Complete this Python code.\n\n```python\n{_SHOWN}\n```",
    ),
    "humaneval_plus-paper": _code(
        "HumanEvalPlus.jsonl",
        PLUS_ROW,
        f"Complete this Python code.\n\n```python\n{_SHOWN}\n```",
    ),
    "mbpp-paper": _code(
        "code/mbpp.jsonl",
        MBPP_ROW,
        f"Write a function to find a third.\n\nIt has to pass:\n\n```python\n{_TESTS}\n```",
    ),
    "mbpp_plus-paper": _code(
        "code/MbppPlus.jsonl",
        PLUS_ROW | {"task_id": "Mbpp/11"},
        f"Complete this Python code.\n\n```python\n{_SHOWN}\n```",
    ),
    "boolq-paper": _choice("boolq/test.json", "true/false"),
    "piqa-paper": _choice("piqa/test.json", "solution1/solution2"),
    "social_iqa-paper": _choice("social_i_qa/test.json", "answer1/answer2/answer3"),
    "hellaswag-paper": _choice("dataset/hellaswag/test.json", "ending1/ending2/ending3/ending4"),
    "winogrande-paper": _choice("commonsense/winogrande_test.json", "option1/option2"),
    "arc_easy-paper": _choice("ARC-Easy/test.json", "answer1/answer2/answer3/answer4/answer5"),
    "arc_challenge-paper": _choice("ARC-Challenge/test.json", "answer1/answer2/answer3/answer4"),
    "openbookqa-paper": _choice("openbookqa/test.json", "answer1/answer2/answer3/answer4"),
    "addsub-llm-adapters": _word_problems("AddSub/test.json"),
    "multiarith-llm-adapters": _word_problems("dataset/MultiArith/test.json"),
    "singleeq-llm-adapters": _word_problems("math_word/SingleEq_test.json"),
    "svamp-llm-adapters": _word_problems("SVAMP/test.json"),
    "mawps-llm-adapters": _word_problems("mawps/test.json"),
    "aqua-llm-adapters": _aqua("AQuA/test.json"),
}
