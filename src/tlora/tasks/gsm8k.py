"""GSM8K: grade-school word problems with worked answers (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tlora.errors import DataError
from tlora.tasks.base import INSTRUCTION_PROMPT, Row, Task, text_of

_CALCULATION = re.compile(r"<<[^<>]*>>")
_FINAL = re.compile(r"\n?####[ \t]*(?P<number>[^\n]+?)\s*$")


def worked_answer(answer: str) -> str:
    """Rewrite a GSM8K answer as prose that ends in "The answer is: n".

    Removes calculator annotations, <<48/2=24>>; the last line "#### 1,024" becomes
    "The answer is: 1024", which the paper's scoring extracts.

    Raises:
        ValueError: the last line is not "#### n".
    """
    match = _FINAL.search(answer)
    if match is None:
        raise ValueError("it does not end in a line '#### number'")
    reasoning = _CALCULATION.sub("", answer[: match.start()]).strip()
    return f"{reasoning}\nThe answer is: {match['number'].replace(',', '')}"


class Gsm8k(Task):
    """Rows with the columns question and answer; the paper's prompt and answer string."""

    formats = ("alpaca", "raw")
    reads = ("loss_on",)
    hub = ("openai/gsm8k", "main")
    hub_eval_split = "test"

    def row(self, raw: Mapping[str, Any], where: str) -> Row:
        """Return {"prompt", "response"}."""
        question = text_of(raw, "question", where).strip()
        try:
            response = worked_answer(text_of(raw, "answer", where))
        except ValueError as error:
            raise DataError(f"{where}: column 'answer': {error}; fix or drop the row.") from None
        return {"prompt": INSTRUCTION_PROMPT.format(instruction=question), "response": response}
