"""A YAML of an evaluation runs no code of its author's, unless the user says so."""

import json

import pytest
from lm_eval.tasks import TaskManager
from scripted import harness_task

from tlora import cli
from tlora.errors import ConfigError, DataError
from tlora.evaluations import catalog
from tlora.evaluations.catalog import Settings
from tlora.evaluations.consent import code_in


@pytest.fixture(autouse=True)
def theirs(monkeypatch, tmp_path_factory):
    """lm-evaluation-harness without its 14,000 names, which take seconds to read."""
    folder = tmp_path_factory.mktemp("theirs")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(catalog, "_theirs", lambda: manager)


@pytest.fixture
def folder(tmp_path):
    """A folder whose utils.py leaves a file behind when it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "utils.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef same(x): return x\ndef score(*_): return {{}}\n"
    )
    return tmp_path


def task(folder, extra="", name="mine", **fields):
    values = harness_task(folder, name) | fields
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join([*lines, extra]))
    return path


def included(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "end.yaml").write_text("process_docs: !function ../utils.same\n")
    (folder / "base.yaml").write_text("include: [deep/end.yaml]\n")
    return task(folder, "include: base.yaml")


def listed(folder):
    text = "group: mine\ntask:\n  - {task: a, process_docs: !function utils.same}\n"
    (folder / "group.yaml").write_text(text)
    return folder / "group.yaml"


HOSTILE = {
    "a field": lambda folder: task(folder, "process_docs: !function utils.same"),
    "a class": lambda folder: task(folder, "class: !function utils.same"),
    "a data set": lambda folder: task(folder, "custom_dataset: !function utils.same"),
    "a metric": lambda folder: task(folder, "filter_list: [{metric: !function utils.same}]"),
    "overwritten": lambda folder: task(
        folder, "process_docs: !function utils.same\nprocess_docs: null"
    ),
    "included": included,
    "a group's member": listed,
}


@pytest.mark.parametrize("place", HOSTILE)
def test_a_function_is_refused_before_it_is_imported(place, folder):
    path = HOSTILE[place](folder)
    with pytest.raises(ConfigError) as error:
        catalog.build([str(path)])
    assert "utils.same` in " in str(error.value) and "trust_remote_code" in str(error.value)
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("consent", ["allow_code_execution", "trust_remote_code"])
def test_with_consent_it_is_imported(consent, folder):
    path = task(folder, "process_docs: !function utils.same")
    assert list(catalog.build([str(path)], settings=Settings(**{consent: True}))) == ["mine"]
    assert (folder / "imported").exists()


def test_the_command_line_asks_for_consent_too(folder, capsys, llama_folder):
    path = task(folder, "process_docs: !function utils.same")
    words = ["eval", llama_folder, "--tasks", str(path), "--output_dir", str(folder / "out")]
    assert cli.main(words) == 2
    assert f"`!function utils.same` in {path}" in capsys.readouterr().err
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("metric", [{"metric": "./mine.py"}, {"metric": "f1", "hf_evaluate": True}])
def test_metrics_that_evaluate_would_download_and_run_are_refused(metric, folder):
    path = task(folder, metric_list=[metric])
    with pytest.raises(ConfigError, match=f"the metric '{metric['metric']}'"):
        catalog.build([str(path)])


def test_a_pickled_data_set_is_refused(folder):
    with pytest.raises(ConfigError, match="the pickled data set"):
        catalog.build([str(task(folder, dataset_path="pandas"))])


def test_templates_reach_no_code(folder):
    mark = folder / "written"
    reach = f"cycler.__init__.__globals__.os.open('{mark}', 64)"
    with pytest.raises(DataError, match="'__init__' of 'type' object is unsafe"):
        catalog.build([str(task(folder, doc_to_text=f"{{{{ {reach} }}}}"))])
    assert not mark.exists()


def test_templates_render_as_before_in_the_sandbox(folder):
    text = "{% set seen = [] %}{% for c in q %}{{ seen.append(c) or '' }}{% endfor %}{{ seen[0] }}"
    text += "{{ q | regex_replace('[0-9]', 'n') }}\n"
    built = catalog.build([str(task(folder, doc_to_text=text))])["mine"]
    assert built.doc_to_text(next(iter(built.test_docs()))) == "1n+n=\n"


def test_a_yaml_without_code_needs_no_consent(folder):
    assert list(catalog.build([str(task(folder))])) == ["mine"]
    assert not (folder / "imported").exists()


def test_includes_and_aliases_that_go_round_end(tmp_path):
    (tmp_path / "a.yaml").write_text("include: b.yaml\ntask: &t [*t]\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    assert code_in(tmp_path / "a.yaml") == []


@pytest.mark.parametrize("text", ["a: !!python/name:os.system", "a: [", "a: !other x"])
def test_other_tags_and_no_yaml_are_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match="not the YAML of an evaluation"):
        code_in(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["a: !!bool x", "a: !!timestamp x", 'include: "\\0"', "[" * 5000])
def test_a_yaml_that_cannot_be_read_is_a_sentence(text, folder):
    (folder / "a.yaml").write_text(text)
    with pytest.raises(DataError, match="not the YAML of an evaluation"):
        code_in(folder / "a.yaml")
