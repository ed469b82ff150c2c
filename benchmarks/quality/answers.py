"""Score every reference answer of the real data sets, and near misses of it, by every protocol.

    python benchmarks/quality/answers.py DATA

DATA holds gsm8k/test.jsonl, math/MATH_test.jsonl, math/math500.jsonl, math_word/*_test.json and
commonsense/*_test.json. A reference has to score right; a near miss (off by one, sign flipped, a
digit dropped, numerator and denominator swapped, another option) has to score wrong. The counts
go to answers.json beside this file; the exit code is 1 if one of them is not as it has to be.
One is not, and is the published rule: metamath-gsm8k reads 1,450,000 as 1450.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tlora.files import write_json
from tlora.scoring.answers import MARK, PROTOCOLS, Protocol, math_verdicts
from tlora.scoring.latex import boxed
from tlora.scoring.symbolic import MathVerify

Score = Callable[[str, str], bool]

COMMONSENSE = {
    "boolq": ("true-false", ["true", "false"]),
    "piqa": ("solution", ["solution1", "solution2"]),
    "social_i_qa": ("answer", [f"answer{n}" for n in range(1, 4)]),
    "ARC-Challenge": ("answer", [f"answer{n}" for n in range(1, 6)]),
    "ARC-Easy": ("answer", [f"answer{n}" for n in range(1, 6)]),
    "openbookqa": ("answer", [f"answer{n}" for n in range(1, 5)]),
    "winogrande": ("option", ["option1", "option2"]),
}
AS_PUBLISHED = {"metamath-gsm8k"}
"""Protocols whose known faults are part of the published figures, and kept."""
WORD_PROBLEMS = ("AddSub", "MultiArith", "SingleEq", "mawps")


def rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list or JSON lines."""
    text = path.read_text(encoding="utf-8")
    return (
        json.loads(text)
        if path.suffix == ".json"
        else [json.loads(x) for x in text.split("\n") if x]
    )


def near_misses(answer: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, answer that is close and wrong); the first number of the answer is changed."""
    number = re.search(r"\d[\d,]*(?:\.\d+)?", answer)
    if number is None:
        return
    digits = number[0].replace(",", "")
    whole, dot, decimals = digits.partition(".")

    def put(text: str) -> str:
        return answer[: number.start()] + text + answer[number.end() :]

    yield "off by one", put(f"{int(whole) + 1}{dot}{decimals}")
    if len(digits) > 1 and dot == "" and int(digits[1:]) != int(digits):
        yield "digit dropped", put(digits[1:])
    if re.fullmatch(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\\[dt]?frac\{\d+\}\{\d+\}", answer) and float(
        digits
    ):
        yield "sign flipped", answer[1:] if answer.startswith("-") else f"-{answer}"
    fraction = re.fullmatch(r"(-?\\[dt]?frac)\{(\d+)\}\{(\d+)\}", answer)
    if fraction and fraction[2] != fraction[3]:
        yield "upside down", f"{fraction[1]}{{{fraction[3]}}}{{{fraction[2]}}}"


class Tally:
    """Counts of one data set under one protocol, and the rows that are not as they have to be."""

    def __init__(self, data: str, protocol: str) -> None:
        self.data, self.protocol = data, protocol
        self.references = self.right = self.misses = self.fooled = 0
        self.faults: list[dict[str, str]] = []

    def reference(self, right: bool, answer: str) -> None:
        """Count a reference."""
        self.references += 1
        self.right += right
        if not right:
            self.faults.append({"reference": answer})

    def miss(self, right: bool, kind: str, wrong: str, answer: str) -> None:
        """Count a near miss."""
        self.misses += 1
        self.fooled += right
        if right:
            self.faults.append({"reference": answer, kind: wrong})


def numeric(data: str, protocol: Protocol, pairs: list[tuple[str, str]], write: str) -> Tally:
    """Score texts with numbers; ``write`` makes a text of a near miss."""
    tally = Tally(data, protocol.name)
    for text, answer in pairs:
        tally.reference(protocol.score(text, answer), answer)
        for kind, wrong in near_misses(answer):
            tally.miss(protocol.score(write.format(wrong), answer), kind, wrong, answer)
    return tally


def math(data: str, pairs: list[tuple[str, str]], verifier: MathVerify) -> list[Tally]:
    """Score solutions of MATH by both rules."""
    tallies = {rule: Tally(data, f"math, {rule}") for rule in ("string", "symbolic")}
    for solution, answer in tqdm(pairs, desc=data, disable=None):
        for rule, right in math_verdicts(solution, answer, verifier).items():
            tallies[rule].reference(right, answer)
        for kind, wrong in near_misses(answer):
            for rule, right in math_verdicts(MARK + wrong, answer, verifier).items():
                tallies[rule].miss(right, kind, wrong, answer)
    return list(tallies.values())


def choices(data: str, found: list[dict[str, Any]]) -> Tally:
    """Score the outputs of a commonsense set, and every other option in its place."""
    name, options = COMMONSENSE[data]
    protocol = PROTOCOLS[name]
    tally = Tally(data, name)
    for row in found:
        text, answer = row["output"], row["answer"]
        tally.reference(protocol.score(text, answer), answer)
        for other in options:
            if other != answer:
                wrong = text.replace(answer, other)
                tally.miss(protocol.score(wrong, answer), "another option", wrong, answer)
    return tally


def tallies(data: Path, verifier: MathVerify) -> Iterator[Tally]:
    """Yield the counts of every data set under each of its protocols."""
    gsm8k = [
        (row["answer"], row["answer"].rpartition("####")[2].strip())
        for row in rows(data / "gsm8k" / "test.jsonl")
    ]
    marked = [(f"{text.rpartition('####')[0]}{MARK}{answer}", answer) for text, answer in gsm8k]
    for name, pairs, write in (
        ("gsm8k", gsm8k, "#### {}"),
        ("gsm8k-last-number", gsm8k, "#### {}"),
        ("answer-is", marked, MARK + "{}"),
        ("metamath-gsm8k", marked, MARK + "{}"),
    ):
        yield numeric("GSM8K test", PROTOCOLS[name], pairs, write)
    for name in WORD_PROBLEMS:
        answers = [str(row["answer"]) for row in rows(data / "math_word" / f"{name}_test.json")]
        for protocol, write in (
            ("llm-adapters-number", "The answer is {}."),
            ("answer-is", MARK + "{}."),
        ):
            pairs = [(write.format(answer), answer) for answer in answers]
            yield numeric(f"{name} test", PROTOCOLS[protocol], pairs, write)
    aqua = [row["answer"] for row in rows(data / "math_word" / "AQuA_test.json")]
    tally = Tally("AQuA test", "llm-adapters-letter")
    for answer in aqua:
        tally.reference(PROTOCOLS[tally.protocol].score(f"({answer})", answer), answer)
        for other in set("ABCDE") - {answer}:
            tally.miss(
                PROTOCOLS[tally.protocol].score(f"({other})", answer), "other", other, answer
            )
    yield tally
    for name in COMMONSENSE:
        yield choices(name, rows(data / "commonsense" / f"{name}_test.json"))
    for name in ("math500", "MATH_test"):
        found = rows(data / "math" / f"{name}.jsonl")
        pairs = [
            (row["solution"], row.get("answer") or boxed(row["solution"]) or "") for row in found
        ]
        yield from math(name, pairs, verifier)


def main() -> int:
    """Print a line for every data set and protocol, and every row that is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    folder = parser.parse_args().data
    results, faults = [], 0
    print(
        f"{'data':<16}{'protocol':<22}{'references':>11}{'right':>7}{'near misses':>13}{'right':>7}"
    )
    with MathVerify() as verifier:
        for t in tallies(folder, verifier):
            print(
                f"{t.data:<16}{t.protocol:<22}{t.references:>11}{t.right:>7}{t.misses:>13}{t.fooled:>7}"
            )
            for fault in t.faults:
                print("   ", fault)
            faults += t.protocol not in AS_PUBLISHED and len(t.faults)
            results.append(vars(t))
    write_json(Path(__file__).with_suffix(".json"), results)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
