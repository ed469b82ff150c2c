"""HumanEval and MBPP: the model is asked for a program, which the sandbox runs.

The paper (arXiv 2604.18124) reports pass@1 by EvalPlus, zero-shot in its one prompt; it does not
say how a problem is put into words as an instruction, nor how the program is cut out of the
reply. Here the instruction shows the code to complete in a fence (for MBPP, the sentence and the
tests). Of a reply, the fenced code counts, up to its demonstration; it stands after HumanEval's
prompt, so that both a whole function and a mere body will do. PiSSA's scripts (arXiv 2404.02948),
of the paper's lineage, cut programs out in that way, and generate 1,024 tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

from tlora.errors import DataError
from tlora.evaluation.code import (
    MBPP_STOPS,
    Check,
    humaneval_check,
    mbpp_check,
    pass_at_k,
    run_checks,
    truncated,
)
from tlora.evaluation.evalplus import inputs_check
from tlora.evaluation.harness.base import Doc, Reading, ReplyTask, Settings
from tlora.evaluation.harness.rows import Raw, Source
from tlora.evaluation.sandbox import Limits, Protection, Sandbox
from tlora.runconfig import DataConfig
from tlora.tasks.base import text_of
from tlora.tasks.code import Code

_FENCED = re.compile(r"```[ \t]*\w*[ \t]*\n(?P<code>.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_ENDS = (*MBPP_STOPS, "\n# Example usage", "\n# Test")
_KS = (1, 10, 100)
_TOP_P = 0.95
"""Of drawn programs; Chen et al. (arXiv 2107.03374), section 3."""


def program_in(reply: str, names: Sequence[str]) -> str:
    """Return the program that a reply holds, up to where it is demonstrated or tested.

    That is what the first fence holds which defines one of ``names``, else the first fence, else
    the whole reply: prose without a fence is no Python, and fails.
    """
    text = reply.replace("\r", "")
    fences = [match["code"] for match in _FENCED.finditer(text)]
    defining = [code for code in fences if any(f"def {name}(" in code for name in names)]
    code = (defining or fences or [text])[0]
    return truncated(code.lstrip("\n"), _ENDS).rstrip()


@functools.cache
def _sandbox(allowed: bool, protection: Protection, limits: Limits) -> Sandbox:
    """Return a sandbox that several evaluations share: making one tries it out."""
    return Sandbox(allow_untrusted_code=allowed, protection=protection, limits=limits)


class CodeTask(ReplyTask):
    """An evaluation that runs programs; its doc carries the raw row, with the tests.

    With one sample a problem is answered greedily; with more, "pass@k" is the unbiased estimate
    of Chen et al. for k = 1, 10, 100, as far as there are k samples.
    """

    reads = "sandbox"
    max_gen_toks = 1024
    item_column = "task_id"
    runs_code = True
    solution = "canonical_solution"
    """Column of the reference solution."""
    limits = Limits()

    def __init__(
        self, name: str, data_dir: str | None = None, settings: Settings | None = None
    ) -> None:
        settings = settings or Settings()
        self.sandbox = _sandbox(settings.allow_code_execution, settings.protection, self.limits)
        self.ks = tuple(k for k in _KS if k <= settings.samples)
        self.metrics = tuple(self.metric(k) for k in self.ks)
        super().__init__(name, data_dir, settings)
        self._config.repeats = settings.samples

    @staticmethod
    def metric(k: int) -> str:
        """Return what the score of k tries is called."""
        return f"pass@{k}"

    def generation(self) -> dict[str, Any]:
        """Return greedy generation, or for several samples drawing."""
        greedy = super().generation()
        if self.settings.samples == 1:
            return greedy
        temperature = self.settings.temperature
        return greedy | {"do_sample": True, "temperature": temperature, "top_p": _TOP_P}

    def instruction(self, raw: Raw, where: str) -> str:
        """Return the problem in words and code."""
        prompt = text_of(raw, "prompt", where).strip()
        return f"Complete this Python code.\n\n```python\n{prompt}\n```"

    def doc(self, raw: Raw, where: str) -> Doc:
        """Return the training task's prompt, the reference solution, and the row."""
        solution = text_of(raw, self.solution, where)
        query = {"query": self.instruction(raw, where), "answer": solution}
        try:
            self.checks(raw, "")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        prompt = Code(DataConfig()).row(query, where)["prompt"]
        return {"prompt": prompt, "target": solution, "row": raw}

    def program(self, raw: Raw, reply: str) -> str:
        """Return the program to run for a reply."""
        return f"{raw['prompt'].rstrip()}\n{program_in(reply, [raw['entry_point']])}\n"

    def checks(self, raw: Raw, program: str) -> list[Check]:
        """Return the checks of a program, each worth making if those before it passed."""
        return [dataclasses.replace(humaneval_check(raw, ""), program=program)]

    def read(self, docs: Sequence[Doc], replies: Sequence[Sequence[str]]) -> list[Reading]:
        """Run the programs of all replies; a problem's score is pass@k of its replies."""
        rows = [doc["row"] for doc, said in zip(docs, replies, strict=True) for _ in said]
        texts = [reply for said in replies for reply in said]
        programs = [self.program(row, text) for row, text in zip(rows, texts, strict=True)]
        stages = [self.checks(row, program) for row, program in zip(rows, programs, strict=True)]
        tried = iter(zip(programs, self._passed(stages), strict=True))
        readings = []
        for said in replies:
            first, *further = itertools.islice(tried, len(said))
            scores = self.scores([count for _, count in (first, *further)])
            readings.append(Reading(said[0], first[0], scores))
        return readings

    def scores(self, passed: Sequence[int]) -> dict[str, float]:
        """Return the scores of a problem, given how many checks each of its programs passed."""
        right = sum(count > 0 for count in passed)
        return {self.metric(k): pass_at_k(len(passed), right, k) for k in self.ks}

    def _passed(self, stages: Sequence[Sequence[Check]]) -> list[int]:
        """Return of each program how many of its checks passed before the first that did not."""
        passed = [0] * len(stages)
        for stage in range(max(map(len, stages))):
            due = [i for i, checks in enumerate(stages) if passed[i] == stage < len(checks)]
            results = run_checks(self.sandbox, [stages[i][stage] for i in due])
            for i, result in zip(due, results, strict=True):
                passed[i] += result.passed
        return passed


class HumanEvalPaper(CodeTask):
    """HumanEval's 164 problems by its own tests (Chen et al., arXiv 2107.03374)."""

    source = Source(
        ("humaneval/test.jsonl", "code/HumanEval.jsonl", "HumanEval.jsonl"),
        "https://github.com/openai/human-eval, data/HumanEval.jsonl.gz",
        hub="openai/openai_humaneval",
    )
    protocol = (
        "zero-shot in the prompt of training, greedy or drawn; HumanEval's tests (Chen et al.,"
        " arXiv 2107.03374) in a sandbox"
    )


class MbppPaper(CodeTask):
    """MBPP's 500 test problems by their asserts (Austin et al., arXiv 2108.07732)."""

    source = Source(
        ("mbpp/test.jsonl", "code/mbpp.jsonl", "mbpp.jsonl"),
        "https://github.com/google-research/google-research, mbpp/mbpp.jsonl",
        hub="google-research-datasets/mbpp",
        configs=("full",),
    )
    protocol = (
        "zero-shot in the prompt of training, with the tests, greedy or drawn; MBPP's asserts"
        " (Austin et al., arXiv 2108.07732) in a sandbox"
    )
    solution = "code"

    def keep(self, raw: Raw) -> bool:
        """Keep the test split: the published file has all 974 problems, numbered from 1."""
        return 11 <= int(raw.get("task_id", 11)) <= 510

    def instruction(self, raw: Raw, where: str) -> str:
        """Return the sentence, and the tests, which alone tell the function's name."""
        tests = "\n".join(raw.get("test_list") or [])
        return (
            f"{text_of(raw, 'text', where).strip()}\n\nIt has to pass:\n\n```python\n{tests}\n```"
        )

    def program(self, raw: Raw, reply: str) -> str:
        """Return the program to run for a reply."""
        return program_in(reply, mbpp_check(raw, "").entry_points) + "\n"

    def checks(self, raw: Raw, program: str) -> list[Check]:
        """Return the check by the problem's asserts."""
        return [dataclasses.replace(mbpp_check(raw, ""), program=program)]


class HumanEvalPlusPaper(CodeTask):
    """HumanEval+ by EvalPlus's inputs; "pass@k_base" is of the inputs that HumanEval itself has.

    See `tlora.evaluation.evalplus` for the departures from EvalPlus's own engine.
    """

    source = Source(
        ("humaneval_plus/test.jsonl", "code/HumanEvalPlus.jsonl", "HumanEvalPlus.jsonl"),
        "https://github.com/evalplus/humanevalplus_release, HumanEvalPlus.jsonl.gz",
    )
    protocol = (
        "zero-shot in the prompt of training, greedy or drawn; EvalPlus's inputs (Liu et al., arXiv"
        " 2305.01210) against its reference solutions, in a sandbox"
    )
    limits = Limits(seconds=60.0, cpu_seconds=60)

    def __init__(
        self, name: str, data_dir: str | None = None, settings: Settings | None = None
    ) -> None:
        super().__init__(name, data_dir, settings)
        self.metrics += tuple(f"{self.metric(k)}_base" for k in self.ks)

    def checks(self, raw: Raw, program: str) -> list[Check]:
        """Return the check by the original inputs, and the one by EvalPlus's further ones."""
        return [inputs_check(raw, program, part) for part in ("base_input", "plus_input")]

    def scores(self, passed: Sequence[int]) -> dict[str, float]:
        """Return pass@k of both sets of inputs together, then of the original one."""
        base = super().scores(passed)
        both = super().scores([count - 1 for count in passed])
        return both | {f"{name}_base": score for name, score in base.items()}


class MbppPlusPaper(HumanEvalPlusPaper):
    """MBPP+ by EvalPlus's inputs; "pass@k_base" is of the inputs that MBPP itself has."""

    source = Source(
        ("mbpp_plus/test.jsonl", "code/MbppPlus.jsonl", "MbppPlus.jsonl"),
        "https://github.com/evalplus/mbppplus_release, MbppPlus.jsonl.gz",
    )
