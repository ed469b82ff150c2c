"""Prompts for the judge, and parsing of its grade.

Single-answer grading (Zheng et al., arXiv 2306.05685, section 3.1 and appendix A): the judge sees
one answer, explains and grades. Four prompts: for the first turn, or for the second with the whole
conversation; with or without reference answers. The published texts are in FastChat's
judge_prompts.jsonl, read from the user's file; the default is our own wording, and every result
records which of the two was used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlora.errors import DataError, first_line

Messages = list[dict[str, str]]
Line = Mapping[str, Any]
Prompt = tuple[str, str]

_NAMES = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
_PUBLISHED = "808ad71f58518f534cedbcee8fc6da9f3fe8a8377e42637700b2d6008023f5a1"
"""Digest of the four published prompts (FastChat, main branch of April 2025)."""
OUR_LABEL = "mtbench-single, our wording"
PUBLISHED_LABEL = "mtbench-single, published prompts"


@dataclass(frozen=True)
class JudgePrompts:
    """The four prompts, by (turn, whether there are reference answers)."""

    label: str
    """Source of the wording; part of every result."""
    prompts: dict[tuple[int, bool], Prompt]
    """System messages, and templates of user messages with named fields."""

    def messages(self, first: Line, second: Line, turn: int) -> Messages:
        """Return the messages for grading the answer to ``turn``, 1 or 2.

        Args:
            first: the line of a question's first turn: "prompt", "reply" and "target" (the
                reference answer, or None).
            second: the line of its second turn.
            turn: the answer to grade.
        """
        system, template = self.prompts[turn, first["target"] is not None]
        fields = {"question": first["prompt"], "answer": first["reply"]}
        for number, line in enumerate((first, second), start=1):
            fields[f"question_{number}"] = line["prompt"]
            fields[f"answer_{number}"] = line["reply"]
            fields[f"ref_answer_{number}"] = line["target"] or ""
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": template.format(**fields)},
        ]


def read_prompts(path: str | Path) -> JudgePrompts:
    """Read the four prompts for single-answer grading from a file in FastChat's form.

    Raises:
        DataError: the file cannot be read, lacks one of the prompts, or a prompt has an unknown
            field.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        rows = {row["name"]: row for row in (json.loads(line) for line in lines if line.strip())}
        prompts = {
            key: (rows[name]["system_prompt"], rows[name]["prompt_template"])
            for key, name in _NAMES.items()
        }
        read = JudgePrompts(f"mtbench-single, prompts of {Path(path).name}", prompts)
        line = {"prompt": "", "reply": "", "target": ""}
        for turn in (1, 2):
            for target in ("", None):
                read.messages(line | {"target": target}, line, turn)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except (
        *(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError),
    ) as error:
        raise DataError(
            f"{path}: not FastChat's prompts for single-answer grading ({first_line(error)});"
            " use that file."
        ) from error
    mark = digest(prompts)
    label = PUBLISHED_LABEL if mark == _PUBLISHED else f"{read.label} ({mark[:12]})"
    return JudgePrompts(label, prompts)


def digest(prompts: dict[tuple[int, bool], Prompt]) -> str:
    """Return a digest (SHA-256) of the texts of the prompts."""
    texts = [(_NAMES[key], *prompts[key]) for key in _NAMES]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))


def rating(text: str) -> float | None:
    """Return the number in a judgment: the first "[[n]]", else the first "[n]".

    Source: FastChat's reading of judgments, published with arXiv 2306.05685.
    """
    for pattern in _RATINGS:
        if match := pattern.search(text):
            return float(match[1])
    return None


_TASK = (
    "You grade how well an AI assistant serves its user. Be impartial: neither the length of an"
    " answer nor the confidence of its tone earns anything by itself."
)
_QUALITIES = (
    "Consider whether the answer does what was asked, whether what it says is right and to the"
    " point, how deep and how detailed it is, and, where the request leaves room for it, how"
    " original."
)
_AGAINST_REFERENCE = (
    "What counts is whether the answer is correct and whether it helps. A correct solution is given"
    " as a reference: go through the answer step by step beside it and name every error."
)
_SECOND = "Grade the answer to the second request alone; the first exchange is its context."
_GRADE = (
    "First write a few sentences on the merits and the faults. Then give a grade from 1 (useless)"
    " to 10 (could not be better), in double square brackets on a line of its own, as in:"
    "\nGrade: [[4]]"
)
_ONE = "<request>\n{question}\n</request>\n\n"
_ONE_REFERENCE = "<reference>\n{ref_answer_1}\n</reference>\n\n"
_ONE_ANSWER = "<answer>\n{answer}\n</answer>"
_TWO_REFERENCES = (
    '<reference to="1">\n{ref_answer_1}\n</reference>\n\n'
    '<reference to="2">\n{ref_answer_2}\n</reference>\n\n'
)
_TWO = (
    '<request number="1">\n{question_1}\n</request>\n\n'
    '<answer number="1">\n{answer_1}\n</answer>\n\n'
    '<request number="2">\n{question_2}\n</request>\n\n'
    '<answer number="2">\n{answer_2}\n</answer>'
)

OURS = JudgePrompts(
    OUR_LABEL,
    {
        (1, False): (f"{_TASK} {_QUALITIES}\n\n{_GRADE}", _ONE + _ONE_ANSWER),
        (1, True): (
            f"{_TASK} {_AGAINST_REFERENCE}\n\n{_GRADE}",
            _ONE + _ONE_REFERENCE + _ONE_ANSWER,
        ),
        (2, False): (f"{_TASK} {_QUALITIES} {_SECOND}\n\n{_GRADE}", _TWO),
        (2, True): (f"{_TASK} {_AGAINST_REFERENCE} {_SECOND}\n\n{_GRADE}", _TWO_REFERENCES + _TWO),
    },
)
