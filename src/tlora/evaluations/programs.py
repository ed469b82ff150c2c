"""HumanEval and MBPP: the model writes a program, which the sandbox runs.

The paper (arXiv 2604.18124) reports pass@1 by EvalPlus, zero-shot in its one prompt; it does not
say how a problem is put into words as an instruction, nor how the program is cut out of the
reply. Here the instruction shows the code to complete in a fence (for MBPP, the sentence and the
tests). Of a reply, the fenced code counts, up to its demonstration; it stands after HumanEval's
prompt, so that both a whole function and a mere body will do. PiSSA's scripts (arXiv 2404.02948),
of the paper's lineage, cut programs out in that way, and generate 1,024 tokens.

These are classes, because YAML alone cannot express how the number of samples and the sandbox's
protection, both of the user, change: how often a model is asked, at which temperature, and where
its programs run. That they run at all is agreed to as for every task of lm-evaluation-harness with
`unsafe_code`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.filter import Filter
from lm_eval.api.task import ConfigurableTask

from tlora.errors import DataError
from tlora.evaluations.rows import Raw
from tlora.evaluations.utils import STOPS, Doc, Reading, documents
from tlora.scoring.evalplus import inputs_check
from tlora.scoring.pass_at_k import (
    MBPP_STOPS,
    Check,
    humaneval_check,
    mbpp_check,
    pass_at_k,
    run_checks,
    truncated,
)
from tlora.scoring.sandbox import Limits, Protection, Sandbox
from tlora.tasks.base import text_of
from tlora.tasks.code import Code
from tlora.tasks.dataconfig import DataConfig

_FENCED = re.compile(r"```[ \t]*\w*[ \t]*\n(?P<code>.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_ENDS = (*MBPP_STOPS, "\n# Example usage", "\n# Test")
_KS = (1, 10, 100)
_TOP_P = 0.95
"""Sampling temperature; Chen et al. (arXiv 2107.03374), section 3."""


def program_in(reply: str, names: Sequence[str]) -> str:
    """Return the program in a reply, up to its demonstration or tests.

    Takes the first fence that defines one of ``names``, else the first fence, else the whole reply,
    which fails if it is prose.
    """
    text = reply.replace("\r", "")
    fences = [match["code"] for match in _FENCED.finditer(text)]
    defining = [code for code in fences if any(f"def {name}(" in code for name in names)]
    code = (defining or fences or [text])[0]
    return truncated(code.lstrip("\n"), _ENDS).rstrip()


@functools.cache
def _sandbox(protection: Protection, limits: Limits) -> Sandbox:
    """Return a sandbox shared by several evaluations; creating one tests it."""
    return Sandbox(allow_untrusted_code=True, protection=protection, limits=limits)


class HumanEval(ConfigurableTask):
    """An evaluation that runs programs; its docs have their raw row as JSON in "row".

    With one sample a problem is answered greedily; with more, "pass@k" is the unbiased estimate
    of Chen et al. for k = 1, 10, 100, as far as there are k samples.

    Args:
        config: the YAML's config. Its `metadata` may set `samples` (1), their `temperature` (0.8)
            and the sandbox's `protection` ("namespaces").

    Raises:
        DataError: rows are missing or invalid.
        SandboxError: the sandbox does not work on this machine.
    """

    limits = Limits()
    solution = "canonical_solution"
    """Column of the reference solution."""
    endings: tuple[str, ...] = ("",)
    """Suffixes of the score names: the last one after the first check has passed, and so on."""

    def __init__(self, config: dict[str, Any]) -> None:
        given = config["metadata"]
        samples, protection = given.get("samples", 1), given.get("protection", "namespaces")
        _sandbox(protection, self.limits)
        programs = {"kind": type(self), "samples": samples, "protection": protection}
        drawn = {"do_sample": True, "temperature": given.get("temperature", 0.8), "top_p": _TOP_P}
        metrics = self.scores([0] * samples)
        config = config | {
            "custom_dataset": self.docs,
            "filter_list": [{"name": "sandbox", "filter": [{"function": Programs, **programs}]}],
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True}
                for name in metrics
            ],
            "repeats": samples,
            "generation_kwargs": config["generation_kwargs"] | (drawn if samples > 1 else {}),
        }
        del config["class"]
        super().__init__(config=config)

    @classmethod
    def docs(cls, **given: Any) -> dict[str, Dataset]:
        """Return the training task's prompts, the reference solutions, and the rows."""
        return documents(given, cls.doc, column="task_id", keep=cls.keep)

    @classmethod
    def doc(cls, raw: Raw, where: str) -> Doc:
        """Return the doc of a row."""
        solution = text_of(raw, cls.solution, where)
        query = {"query": cls.instruction(raw, where), "answer": solution}
        try:
            cls.checks(raw, "")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        prompt = Code(DataConfig()).row(query, where)["prompt"]
        return {"prompt": prompt, "target": solution, "row": json.dumps(raw)}

    @classmethod
    def keep(cls, raw: Raw) -> bool:
        """Whether a row of the file belongs to the evaluation."""
        return True

    @classmethod
    def instruction(cls, raw: Raw, where: str) -> str:
        """Return the problem in words and code."""
        prompt = text_of(raw, "prompt", where).strip()
        return f"Complete this Python code.\n\n```python\n{prompt}\n```"

    @classmethod
    def program(cls, raw: Raw, reply: str) -> str:
        """Return the program to run for a reply."""
        return f"{raw['prompt'].rstrip()}\n{program_in(reply, [raw['entry_point']])}\n"

    @classmethod
    def checks(cls, raw: Raw, program: str) -> list[Check]:
        """Return the checks of a program; each only runs if the earlier ones passed."""
        return [dataclasses.replace(humaneval_check(raw, ""), program=program)]

    @classmethod
    def scores(cls, passed: Sequence[int]) -> dict[str, float]:
        """Return the scores of a problem, given the number of checks each program passed."""
        size = len(passed)
        return {
            f"pass@{k}{ending}": pass_at_k(size, sum(count >= least for count in passed), k)
            for least, ending in reversed(list(enumerate(cls.endings, start=1)))
            for k in _KS
            if k <= size
        }


class Mbpp(HumanEval):
    """MBPP, with the asserts in the prompt."""

    solution = "code"

    @classmethod
    def keep(cls, raw: Raw) -> bool:
        """Keep the test split: the published file has all 974 problems, numbered from 1."""
        return 11 <= int(raw.get("task_id", 11)) <= 510

    @classmethod
    def instruction(cls, raw: Raw, where: str) -> str:
        """Return the sentence and the tests, which give the function's name."""
        tests = "\n".join(raw.get("test_list") or [])
        return (
            f"{text_of(raw, 'text', where).strip()}\n\nIt has to pass:\n\n```python\n{tests}\n```"
        )

    @classmethod
    def program(cls, raw: Raw, reply: str) -> str:
        """Return the program to run for a reply."""
        return program_in(reply, mbpp_check(raw, "").entry_points) + "\n"

    @classmethod
    def checks(cls, raw: Raw, program: str) -> list[Check]:
        """Return the check by the problem's asserts."""
        return [dataclasses.replace(mbpp_check(raw, ""), program=program)]


class Plus(HumanEval):
    """EvalPlus's form of both; "pass@k_base" uses the inputs of the original set."""

    limits = Limits(seconds=60.0, cpu_seconds=60)
    endings = ("_base", "")

    @classmethod
    def checks(cls, raw: Raw, program: str) -> list[Check]:
        """Return the checks on the original inputs and on EvalPlus's additional ones."""
        return [inputs_check(raw, program, part) for part in ("base_input", "plus_input")]


class Programs(Filter):
    """Runs the programs of all replies; a problem's score is pass@k of its replies.

    Args:
        kind: the class of evaluation.
        samples: replies per problem; with several processes, the last problem may have padding
            replies.
        protection: isolation level of the sandbox.
    """

    def __init__(self, kind: type[HumanEval], samples: int, protection: Protection) -> None:
        self.kind, self.samples = kind, samples
        self.sandbox = _sandbox(protection, kind.limits)

    def apply(self, resps: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[Reading]:
        """Return a reading for each doc."""
        replies = [[truncated(text, STOPS) for text in texts[: self.samples]] for texts in resps]
        pairs = [
            (json.loads(doc["row"]), t) for doc, s in zip(docs, replies, strict=True) for t in s
        ]
        programs = [self.kind.program(*pair) for pair in pairs]
        checks = [self.kind.checks(row, p) for (row, _), p in zip(pairs, programs, strict=True)]
        tried = iter(zip(programs, self._passed(checks), strict=True))
        readings = []
        for said in replies:
            first, *further = itertools.islice(tried, len(said))
            scores = self.kind.scores([count for _, count in (first, *further)])
            readings.append({"reply": said[0], "answer": first[0], "scores": scores})
        return readings

    def _passed(self, stages: Sequence[Sequence[Check]]) -> list[int]:
        """Return for each program the number of checks passed before the first failure."""
        passed = [0] * len(stages)
        for stage in range(max(map(len, stages))):
            due = [i for i, checks in enumerate(stages) if passed[i] == stage < len(checks)]
            results = run_checks(self.sandbox, [stages[i][stage] for i in due])
            for i, result in zip(due, results, strict=True):
                passed[i] += result.passed
        return passed
