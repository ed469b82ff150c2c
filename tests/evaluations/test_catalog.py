"""Which name becomes which task."""

import importlib.metadata
import json
import sys
import types

import pytest
from lm_eval.tasks import TaskManager
from scripted import CASES, GROUPS, config, harness_task

from tlora.errors import ConfigError, DataError
from tlora.evaluations import catalog
from tlora.evaluations.catalog import Settings


def yaml(folder, name, **more):
    config = harness_task(folder, name) | {"generation_kwargs": {"until": ["\n"]}} | more
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))  # which YAML contains
    return path


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """lm-evaluation-harness with five names in place of its 14,000, which take seconds to read."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    yaml(folder, "hellaswag", tag="endings")
    yaml(folder, "swag", tag="endings")
    yaml(folder, "unsafe", unsafe_code=True)
    yaml(folder, "offline", dataset_kwargs={"data_files": str(folder / "gone.jsonl")})
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(catalog, "_theirs", lambda: manager)
    return folder


def test_ours_and_theirs_come_in_the_order_asked_for_and_once(theirs, tmp_path):
    folder = CASES["gsm8k-paper"].write(tmp_path)
    tasks = catalog.build(["swag", "gsm8k-paper", "swag", "gsm8k-hashes"], folder)
    assert list(tasks) == ["swag", "gsm8k-paper", "gsm8k-hashes"]
    assert [task.task_name for task in tasks.values()] == list(tasks)


def test_a_group_of_theirs_and_the_path_of_a_yaml_are_taken(theirs, tmp_path):
    (tmp_path / "own").mkdir()
    mine = yaml(tmp_path / "own", "mine")
    assert list(catalog.build(["endings", str(mine)])) == ["hellaswag", "swag", "mine"]


def test_unknown_names_are_reported_together_with_suggestions(theirs):
    with pytest.raises(ConfigError) as error:
        catalog.build(["gsm8k-papr", "hellaswagg", "math", "jsonl", "zzz", "gsm8k-paper"])
    one, two, sets, rows, three = error.value.faults
    assert sets == "there is no task 'math'. Did you mean 'math-paper'?"
    assert "'jsonl' is a training task; give --test_file" in rows
    assert one == "there is no task 'gsm8k-papr'. Did you mean 'gsm8k-paper'?"
    assert two == "there is no task 'hellaswagg'. Did you mean 'hellaswag'?"
    assert three.startswith(
        "there is no task 'zzz'. Run `tlora list evaluations` for built-in ones"
    )


def test_theirs_that_cannot_be_loaded_are_named_with_the_cause(theirs):
    with pytest.raises(DataError, match="offline: lm-evaluation-harness cannot load it"):
        catalog.build(["offline"])


def test_theirs_that_run_programs_are_refused_unless_allowed(theirs):
    with pytest.raises(ConfigError, match="'unsafe' of lm-evaluation-harness runs programs"):
        catalog.build(["unsafe"])
    assert list(catalog.build(["unsafe"], settings=Settings(allow_code_execution=True)))


def test_another_package_adds_a_file_by_an_entry_point(tmp_path, monkeypatch):
    path = yaml(tmp_path, "theirs-own")
    point = importlib.metadata.EntryPoint("theirs-own", "elsewhere:PATH", "tlora.evaluations")
    monkeypatch.setitem(sys.modules, "elsewhere", types.SimpleNamespace(PATH=path))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert list(catalog.build(["theirs-own"])) == ["theirs-own"]


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_expands_to_its_members(name, tmp_path):
    members = config(name)["task"]
    for member in members:
        CASES[member].write(tmp_path)
    tasks = catalog.build([name, members[0]], str(tmp_path))
    assert list(tasks) == members
