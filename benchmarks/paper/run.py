"""Train and evaluate one row of the paper's tables, by `tlora train` and `tlora eval`; one JSON::

    benchmarks/paper/run.sh --list
    benchmarks/paper/run.sh math/tlora
    benchmarks/paper/run.sh code/lora --allow_code_execution
    benchmarks/paper/run.sh chat/tlora --data data --eval "--judge.url URL --judge.model gpt-4"
    benchmarks/paper/run.sh glue/pissa --print      # the commands, without running them

The same command again resumes: finished trainings and evaluations are not done again. The result
is OUT/results/ROW.json: the paper's figures beside ours, the commands, what the trainings took.
`--base`, `--data`, `--train` and `--eval` can make it another experiment; the JSON names them.

Files of `--data FOLDER`, each in place of the Hub where it is there: train/GROUP.* with the rows of
a group (train/math.jsonl), glue/TASK/train.* and dev.*, and those of docs/evaluation.md, Tasks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rows import GLUE, GROUPS, NOT_RUN, Group, Row, rows

from tlora.errors import did_you_mean
from tlora.evaluate.evalfolder import EvalFolder
from tlora.files import write_json
from tlora.training.runfolder import RunFolder

Command = list[str]
"""The words after `tlora`."""
_OVERRIDES = ("base", "data", "train", "eval")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(prog="run.sh", description=(__doc__ or "").split("::")[0])
    parser.add_argument("row", nargs="?", help="a row of --list, as math/tlora")
    parser.add_argument("--list", action="store_true", help="list the rows, and those not run")
    parser.add_argument("--print", action="store_true", help="print the commands alone")
    parser.add_argument("--out", default="runs", help="folder of runs, evaluations and results")
    parser.add_argument("--base", help="model in place of the paper's")
    parser.add_argument("--data", help="folder with rows, in place of the Hub")
    parser.add_argument("--train", default="", help="further flags of tlora train, in one word")
    parser.add_argument("--eval", default="", help="further flags of tlora eval, in one word")
    parser.add_argument(
        "--allow_code_execution", action="store_true", help="run the programs that models write"
    )
    asked = parser.parse_args(words)
    if asked.list:
        return asked
    if asked.row is None:
        parser.error("name a row; --list shows the rows.")
    if asked.row not in rows():
        hint = did_you_mean(asked.row, rows())
        parser.error(f"there is no row {asked.row!r}.{hint} --list shows the rows.")
    if asked.data and not Path(asked.data).is_dir():
        parser.error(f"--data {asked.data}: there is no such folder.")
    for flag in ("train", "eval"):
        try:
            shlex.split(getattr(asked, flag))
        except ValueError as error:
            parser.error(f"--{flag} cannot be split into words: {error}.")
    runs_code = GROUPS[rows()[asked.row].group].runs_code and not asked.print
    if runs_code and not asked.allow_code_execution:
        parser.error(f"{asked.row} runs programs that a model writes: give --allow_code_execution.")
    return asked


def listing() -> Iterator[str]:
    """Yield a line for each row: its name, and the paper's figures."""
    for name, row in rows().items():
        figures = zip(GROUPS[row.group].columns, row.paper, strict=True)
        yield f"{name:<26}" + ", ".join(f"{column} {figure}" for column, figure in figures)
    for name in NOT_RUN:
        yield f"{name:<26}not run: the paper's settings for it are not known to us"


def commands(asked: argparse.Namespace) -> list[Command]:
    """Return the commands of a row: a training and its evaluation, for GLUE of each task."""
    row = rows()[asked.row]
    group = GROUPS[row.group]
    parts = list(GLUE) if row.group == "glue" else [None]
    return [each for part in parts for each in _pair(asked, row, group, part)]


def _pair(
    asked: argparse.Namespace, row: Row, group: Group, part: str | None
) -> tuple[Command, Command]:
    """Return the training of a row, of GLUE that of one task, and the evaluation of it."""
    run, result = (str(folder / (part or "")) for folder in _folders(asked))
    train = ["train", "--preset", group.preset, *row.flags]
    evaluate = ["eval", run, "--tasks", part or ",".join(group.columns.values())]
    if part:
        train += ["--task", part]
    if asked.base:
        train += ["--model", asked.base]
    if file := _file(asked, f"glue/{part}/train.*" if part else f"train/{row.group}.*"):
        train += ["--train_file", file]
    if part and (file := _file(asked, f"glue/{part}/dev.*")):
        evaluate += ["--test_file", file]
    if asked.data and not part:
        evaluate += ["--data_dir", asked.data]
    if group.runs_code:
        evaluate += ["--allow_code_execution"]
    return (
        [*train, *shlex.split(asked.train), "--output_dir", run],
        [*evaluate, *group.asked, *shlex.split(asked.eval), "--output_dir", result],
    )


def _folders(asked: argparse.Namespace) -> tuple[Path, Path]:
    """Return where the row is trained, and where it is evaluated."""
    return Path(asked.out) / asked.row, Path(asked.out) / "eval" / asked.row


def _file(asked: argparse.Namespace, pattern: str) -> str | None:
    found = sorted(Path(asked.data).glob(pattern)) if asked.data else []
    return str(found[0]) if found else None


def result(asked: argparse.Namespace, done: list[Command]) -> dict[str, Any]:
    """Return what the finished commands of a row left, as plain JSON values."""
    row = rows()[asked.row]
    group = GROUPS[row.group]
    runs = [RunFolder(command[-1]) for command in done if command[0] == "train"]
    evaluations = [EvalFolder(command[-1]).read() for command in done if command[0] == "eval"]
    scores = {
        entry["name"]: scored
        for evaluation in evaluations
        for entry in evaluation["tasks"]
        for scored in entry["scores"].values()
    }
    return {
        "row": asked.row,
        "paper": dict(zip(group.columns, row.paper, strict=True)),
        "ours": {column: _figure(group, column, scores) for column in group.columns},
        "overridden": [name for name in _OVERRIDES if getattr(asked, name)],
        "scores": scores,
        "commands": [shlex.join(["tlora", *command]) for command in done],
        "trainings": [run.measured() | {"config": run.config()} for run in runs],
        "provenance": evaluations[-1]["provenance"],
    }


def _figure(group: Group, column: str, scores: dict[str, dict[str, float]]) -> float | None:
    """Return a figure as the paper has it; None before a judge has graded."""
    asked = group.columns[column].split(",")
    if asked == ["commonsense-paper"]:
        asked = list(scores)
    if not all(scores[name] for name in asked):
        return None
    factor = 100 if group.percent else 1
    return factor * fmean(_score(name, scores[name]) for name in asked)


def _score(name: str, scored: dict[str, float]) -> float:
    """Return the score of an evaluation, its first unless it is a task of GLUE."""
    return fmean(scored[metric] for metric in GLUE.get(name, list(scored)[:1]))


def by_process(command: Command) -> int:
    """Run one command as a user does, also to its end when interrupted; return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "tlora.cli", *command])
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # a terminal's Ctrl-C reaches the command too
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def main(words: Sequence[str] | None = None, tlora: Callable[[Command], int] = by_process) -> int:
    """Run one row; return the exit code of the command that failed, 0 if none did."""
    asked = arguments(words)
    if asked.list:
        print("\n".join(listing()))
        return 0
    planned = commands(asked)
    for command in planned:
        print(shlex.join(["tlora", *command]), flush=True)
        if not asked.print and (code := tlora(command)):
            return code
    if not asked.print:
        file = Path(asked.out) / "results" / f"{asked.row.replace('/', '-')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found := result(asked, planned))
        print(f"{file}: {json.dumps(found['ours'])}, the paper {json.dumps(found['paper'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
