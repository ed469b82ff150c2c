"""Names of evaluations are judged from files alone, as lm-evaluation-harness itself would."""

import json
import re

import pytest
from lm_eval.tasks import TaskManager

from tlora.errors import ConfigError
from tlora.evaluations import names
from tlora.registry import EVALUATIONS


@pytest.fixture(scope="module")
def harness():
    return TaskManager().task_index


def test_no_name_of_the_harness_is_refused(harness):
    files = names._HarnessFiles.read()
    # Searching 7 MB for each of 14,000 names would take minutes.
    words = {*re.split(rb"[^\w-]+", files._all)}
    others = [name for name in harness if name.encode() not in words]
    assert [name for name in others if name.encode() not in files._all] == []
    some = sorted(harness)[::1000]
    assert [name for name in some if name not in files] == []
    assert {*files} & {*harness} > {"gsm8k", "hellaswag", "humaneval"}
    for name in ("nosuch", "gsm8", "hellaswagg", "umaneval"):
        assert name not in files


def test_programs_of_the_harness_are_those_that_it_marks(harness):
    files = names._HarnessFiles.read()
    entries = {name: entry for name, entry in harness.items() if entry.yaml_path and entry.cfg}
    unsafe = {name for name, entry in entries.items() if entry.cfg.get("unsafe_code")}
    assert {"humaneval", "humaneval_plus", "mbpp"} <= unsafe
    safe = set(sorted(entries.keys() - unsafe)[::500])
    named = {*files}
    for name in (unsafe | safe) & named:
        assert files.runs_programs(name) == (name in unsafe), name


def test_ours_are_read_as_the_harness_reads_them():
    known = EVALUATIONS.names()
    own, _ = names._ours(known)
    index = TaskManager(include_path=names.folders(known), include_defaults=False).task_index
    read = {name: entry.cfg for name, entry in index.items() if entry.cfg}
    assert own.keys() - {"None"} == read.keys()
    for name, cfg in read.items():
        for field in ("task", "group", "unsafe_code", "dataset_kwargs"):
            assert own[name].get(field) == cfg.get(field), (name, field)


def test_groups_of_ours_are_expanded_once_each():
    found = names.expanded(["piqa-paper", "commonsense-paper", "other", "piqa-paper"])
    assert found[0] == "piqa-paper"
    assert found[-1] == "other"
    assert len(found) == len({*found}) == 9


def test_the_path_of_a_yaml_is_taken_and_its_programs_are_not(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"task": "mine"}))
    names.check_tasks([str(path)], allow_code_execution=False)
    (tmp_path / "_base.yaml").write_text("unsafe_code: true\nprocess_results: !function utils.f\n")
    path.write_text(json.dumps({"task": "mine", "include": "_base.yaml"}))
    names.check_tasks([str(path)], allow_code_execution=True)
    with pytest.raises(ConfigError, match="runs programs without a sandbox"):
        names.check_tasks([str(path)], allow_code_execution=False)


@pytest.mark.parametrize("text", ["include: a.yaml", "include: 5", "a: !!bool x", "[" * 5000])
def test_a_yaml_that_the_harness_cannot_read_runs_no_programs(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    assert not names._HarnessFiles({}).runs_programs(str(tmp_path / "a.yaml"))
