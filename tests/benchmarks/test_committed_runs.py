"""Runs that are committed stay the runs of the file that made them, and read as they did."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

from tlora.compare import defaults as comparedefaults
from tlora.compare import experiment
from tlora.compare import trials as comparetrials
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.parsing import parse
from tlora.registry import METHODS, TASKS
from tlora.report import comparison, page, plaintext
from tlora.tasks.dataconfig import DataConfig
from tlora.training import arguments
from tlora.training.kinds import KINDS
from tlora.training.runconfig import CalibrationConfig

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
FOLDERS = sorted(path.parent for path in QUALITY.glob("*/compare.json"))
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)

PLACES = {"guard_dir", "cache"}
"""Fields that say where files are: they define no run."""


def names_of(record):
    return {field.name for field in dataclasses.fields(record)}


def saved_in(folder):
    return json.loads((folder / "compare.json").read_text())


def read(file, folder):
    """Return the record of ``file`` with the rows of the comparison in ``folder``."""
    words = [word for name in saved_in(folder)["shared"]["files"] for word in (f"--{name}", name)]
    return parse("tlora compare", CompareConfig, [str(file), *words]).record


@functools.cache
def committed(folder):
    return read(folder.with_suffix(".yaml"), folder)


@pytest.fixture
def comparison_of(monkeypatch):
    """Return the comparison of a record, with the rows and the model of one that is committed."""

    def made(config, folder):
        saved = saved_in(folder)
        # Rows and weights are not here; what they were is.
        files, model = saved["shared"]["files"], saved["shared"]["model"]
        monkeypatch.setattr(experiment, "input_digest", lambda name: files[name])
        monkeypatch.setattr(experiment, "model_identity", lambda name: model)
        shared = comparetrials.digest(experiment.experiment(config))
        return comparetrials.Comparison(config, saved["metric"], saved["better"], shared)

    return made


def first_try_rates(folder, entry):
    rate = comparetrials.saved(CompareFolder(folder)).default(entry)
    return [] if rate is None else [rate]


@each_folder
def test_the_file_beside_committed_runs_still_names_them(folder, comparison_of):
    made = comparison_of(committed(folder), folder)
    assert made.experiment == saved_in(folder)["experiment"]
    known = {trial.name for trial in made.tuning()}
    known |= {
        trial.name
        for entry in made.config.entries()
        for learning_rate in {*entry.learning_rates, *first_try_rates(folder, entry)}
        for trial in made.final(entry, learning_rate)
    }
    runs = {file.stem for file in (folder / "runs").glob("*.json")}
    assert runs
    assert runs <= known


@each_folder
def test_that_file_pins_every_default(folder):
    given = yaml.safe_load(folder.with_suffix(".yaml").read_text())
    for section, record in (("data", DataConfig), ("calibration", CalibrationConfig)):
        assert names_of(record) - PLACES - given[section].keys() == set()
    assert {"dtype", "quantization", "trust_remote_code"} <= given.keys()
    config = committed(folder)
    kind = KINDS[TASKS.load(config.task)(config.data).kind]
    deciding = comparedefaults.TRAINER.keys() & arguments.defaults(kind)
    assert deciding - (config.trainer_defaults | config.trainer).keys() == set()
    for entry in config.entries():
        # A seed that is not given is the run's.
        assert names_of(METHODS.load(entry.name).options) - entry.adapter.keys() <= {"seed"}


def test_there_is_a_value_as_before_for_every_field_and_option():
    for section, record in (("data", DataConfig), ("calibration", CalibrationConfig)):
        assert names_of(record) - PLACES <= comparedefaults.SHARED[section].keys()
    for name, options in comparedefaults.METHODS.items():
        assert names_of(METHODS.load(name).options) - {"seed"} <= options.keys()


def change_default(monkeypatch, record, name, value):
    """Change the default of a field, as a later version might."""
    monkeypatch.setattr(record.__dataclass_fields__[name], "default", value)
    if name in (record.__init__.__kwdefaults__ or {}):
        monkeypatch.setitem(record.__init__.__kwdefaults__, name, value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ((DataConfig, "data", "loss_on"), "all"),
        ((CalibrationConfig, "calibration", "skip_bad_samples"), True),
        ((SFTConfig, "trainer_defaults", "max_grad_norm"), 0.5),
        ((METHODS.load("tlora").options, "adapter_defaults", "scale_rule"), "constant"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_changed_default_gives_new_names_unless_the_old_value_is_pinned(
    field, value, comparison_of, monkeypatch, tmp_path
):
    record, section, name = field
    folder, pinned = QUALITY / "demo", QUALITY / "demo.yaml"
    values = yaml.safe_load(pinned.read_text())
    del values[section][name]
    unpinned = tmp_path / "unpinned.yaml"
    unpinned.write_text(yaml.safe_dump(values))

    def names(file):
        return {trial.name for trial in comparison_of(read(file, folder), folder).tuning()}

    before = names(pinned)
    assert names(unpinned) == before
    change_default(monkeypatch, record, name, value)
    assert names(pinned) == before
    assert names(unpinned) != before


@each_folder
def test_tables_and_page_are_those_that_are_committed(folder):
    results = comparison.read(CompareFolder(folder))
    assert plaintext.markdown(results) == (folder / "report.md").read_text(encoding="utf-8")
    assert plaintext.table(results) == (folder / "report.csv").read_text(encoding="utf-8")
    assert page.render(results) == (folder / "report.html").read_text(encoding="utf-8")
