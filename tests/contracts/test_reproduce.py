"""docs/reproduce.md: its commands are such that the command line takes, its figures predicted."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import LLAMA_2_7B
from tlora.cli import VERBS
from tlora.compare.compareconfig import CompareConfig
from tlora.evaluate.evalconfig import EvalConfig
from tlora.parsing import parse
from tlora.registry import CONVERSATIONS, EVALUATIONS, TASKS
from tlora.training import dryrun
from tlora.training.kinds import KINDS, check_trainer_fields
from tlora.training.runconfig import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def commands(lines: Iterator[str]) -> list[str]:
    """The commands of a shell script, its loops written out; up to the `done` of this loop."""
    found: list[str] = []
    for line in lines:
        if loop := re.fullmatch(r"for (\w+) in (.+); do", line):
            body = commands(lines)
            for value in loop[2].split():
                found += [re.sub(rf"\${loop[1]}\b", value, each) for each in body]
        elif line == "done":
            break
        else:
            found.append(line)
    return found


@functools.cache
def of_the_page() -> list[list[str]]:
    code = re.findall(r"(?:^ {4}.*\n)+", PAGE, re.MULTILINE)
    script = "".join(code).replace("\\\n", " ")
    return [shlex.split(each) for each in commands(map(str.strip, iter(script.splitlines())))]


SCRIPT = "benchmarks/paper/run.sh"
LAUNCHER = ["deepspeed", "--include=localhost:0", "--module", "tlora.cli"]


def record_of(verb: str, *flags: str) -> Any:
    return parse(f"tlora {verb}", VERBS[verb].record, list(flags)).record


@functools.cache
def records() -> list[tuple[str, Any]]:
    """Verb and record of every command of `tlora` itself."""
    return [
        (verb, record_of(verb, *flags)) for name, verb, *flags in of_the_page() if name == "tlora"
    ]


def unknown_tasks(config: EvalConfig) -> set[str]:
    return set(config.tasks) - {*EVALUATIONS.names(), *CONVERSATIONS.names(), *TASKS.names()}


def test_the_loops_are_written_out():
    script = "for a in 1 2; do\nfor b in x y; do\ntlora $a-$b\ndone\ntlora $a\ndone\ntlora"
    expected = ["1-x", "1-y", "1", "2-x", "2-y", "2"]
    assert commands(iter(script.splitlines())) == [*(f"tlora {e}" for e in expected), "tlora"]


def test_every_command_of_the_page_is_one_that_the_command_line_takes():
    words = of_the_page()
    assert {name for name, *_ in words} == {"tlora", "deepspeed", SCRIPT}
    assert not any("$" in word for command in words for word in command)
    assert len(words) > 50
    assert {verb for verb, _ in records()} == {"init", "train", "eval", "compare"}
    for _, record in records():
        if isinstance(record, EvalConfig):
            assert not unknown_tasks(record)
        if isinstance(record, (RunConfig, CompareConfig)):
            run = record.resolved()
            task = TASKS.load(run.task)(run.data)
            check_trainer_fields(KINDS[task.kind], run.trainer)


def test_the_launches_by_deepspeed_are_the_presets_own_runs():
    launches = [words for words in of_the_page() if words[0] == "deepspeed"]
    groups = []
    for words in launches:
        assert words[:4] == LAUNCHER
        run = record_of(*words[4:])
        assert (ROOT / run.trainer.pop("deepspeed")).is_file()
        groups.append(Path(run.output_dir).name)
        assert run == record_of(
            "train", "--preset", f"paper-{groups[-1]}", "--output_dir", run.output_dir
        )
    assert groups == ["math", "commonsense", "code", "chat"]


@pytest.fixture
def script(monkeypatch) -> Any:
    """What `benchmarks/paper/run.sh` runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "paper"))
    yield importlib.import_module("run")
    for module in ("run", "rows"):
        monkeypatch.delitem(sys.modules, module)


def test_the_trainings_of_the_page_are_the_rows_that_a_script_runs(script, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = [script.arguments([name, "--print"]) for name in script.rows()]
    planned = [words for each in asked for words in script.commands(each) if words[0] == "train"]
    by_script = {words[-1]: record_of(*words) for words in planned}
    assert by_script == {r.output_dir: r for verb, r in records() if verb == "train"}
    on_page = [words for name, *words in of_the_page() if name == SCRIPT]
    assert len(on_page) == 7
    for words in on_page:
        assert script.arguments(words)  # or it exits


def test_no_two_commands_write_to_one_folder_and_what_is_trained_is_evaluated():
    written = [record.output_dir for verb, record in records() if verb != "init"]
    assert len(written) == len(set(written))
    asked = {model for verb, record in records() if verb == "eval" for model in record.models}
    trained = {record.output_dir for verb, record in records() if verb == "train"}
    matched = {pattern: set(fnmatch.filter(trained, pattern)) for pattern in asked}
    assert all(matched.values())
    assert set().union(*matched.values()) == trained


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return str(folder)


def tables() -> dict[str, list[list[str]]]:
    """The lines of the table of dry runs by what they are of."""
    lines = PAGE.partition("| run | method |")[2].partition("\n\n")[0].splitlines()[2:]
    found: dict[str, list[list[str]]] = {}
    run = ""
    for line in lines:
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        run = first or run
        found.setdefault(run, []).append(cells)
    return found


def test_the_figures_of_the_page_are_those_of_its_dry_runs(llama):
    dry_runs = [flags for name, verb, *flags in of_the_page() if (name, verb) == ("tlora", "init")]
    for flags, (run, lines) in zip(dry_runs, tables().items(), strict=True):
        config = parse("tlora init", VERBS["init"].record, [*flags, "--model", llama]).record
        dry = dryrun.run(config.run_config())
        assert run.endswith(f": batches of {dry.batch}")
        assert f"{dry.calibration.peak() / 2**30:.1f} GiB" in PAGE
        for way, cells in zip(dry.training, lines, strict=True):
            peaks = [f"{way.peak(again) / 2**30:.1f} GiB" for again in (True, False)]
            assert cells == [way.name, f"{way.trainable / 1e6:,.2f}M", *peaks]


def test_the_results_of_the_page_are_those_that_are_committed():
    lines = PAGE.partition("## What has been run")[2].splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 3
    for words, *cells in rows:
        name = words.partition(":")[0].strip()
        file = ROOT / "benchmarks" / "quality" / "endtoend" / name / "eval.json"
        result = json.loads(file.read_text())
        (task,) = result["tasks"]
        kinds = {model["kind"]: model["name"] for model in result["models"]}
        assert list(kinds)[-2:] == ["adapter", "merged"]
        scores = [
            f"{task['scores'][kinds[kind]][task['metrics'][0]]:.3f}" if kind in kinds else "no head"
            for kind in ("base", "adapter", "merged")
        ]
        speeds = [f"{task['items'] / task['seconds'][name]:.1f}" for name in kinds.values()]
        assert [cell.strip() for cell in cells] == [str(task["items"]), *scores, ", ".join(speeds)]
