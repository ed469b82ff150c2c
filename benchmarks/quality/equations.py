"""Word problems with their equations, from MAWPS, as the rows of smollm2-equations.yaml.

    python benchmarks/quality/equations.py math_word/mawps_train.json rows/equations

reads a JSON list of `original_text` and `equation` and writes train.jsonl and test.jsonl with
`prompt` and `response`. Each question is kept once, whatever its case and marks, with its first
equation. Of these rows 300, drawn with a fixed seed, are test rows. Equations are written in one
form, because the file mixes several: `X=(7.0+8.0)` and `x=7+8` both become `x=7+8`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

TEST_ROWS = 300
SEED = 0


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="MAWPS as a JSON list")
    parser.add_argument("folder", type=Path, help="where train.jsonl and test.jsonl go")
    arguments = parser.parse_args()
    train, test = split(rows(json.loads(arguments.file.read_text(encoding="utf-8"))))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        lines = "".join(f"{json.dumps(row)}\n" for row in part)
        (arguments.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(part)} rows")


def rows(problems: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return a prompt and a response for each question, in the order of the file, each once."""
    found: dict[str, dict[str, str]] = {}
    for problem in problems:
        question = " ".join(problem["original_text"].split())
        row = {"prompt": question, "response": one_form(problem["equation"])}
        found.setdefault("".join(re.findall(r"\w", question.casefold())), row)
    return list(found.values())


def split(found: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and test rows; both keep the order of the file."""
    chosen = set(random.Random(SEED).sample(range(len(found)), TEST_ROWS))
    train = [row for place, row in enumerate(found) if place not in chosen]
    return train, [found[place] for place in sorted(chosen)]


def one_form(equation: str) -> str:
    """Return an equation with a small x, without spaces, `.0` and brackets around a whole side."""
    text = re.sub(r"(\d)\.0+(?!\d)", r"\1", re.sub(r"\s", "", equation).replace("X", "x"))
    return "=".join(_without_outer(side) for side in text.split("="))


def _without_outer(side: str) -> str:
    """Return an expression without the brackets that hold all of it."""
    while side.startswith("(") and _closing(side) == len(side) - 1:
        side = side[1:-1]
    return side


def _closing(text: str) -> int:
    """Return the place of the bracket that closes the one which ``text`` begins with, or -1."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return -1


if __name__ == "__main__":
    main()
