"""Runs that are committed stay the runs of the file that made them."""

import json
from pathlib import Path

import pytest

from tlora import comparetrials
from tlora.compareconfig import CompareConfig
from tlora.parsing import parse
from tlora.stages import experiment

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
FOLDERS = sorted(path.parent for path in QUALITY.glob("*/compare.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_file_beside_committed_runs_still_names_them(folder, monkeypatch):
    saved = json.loads((folder / "compare.json").read_text())
    # Rows and weights are not here; what they were is.
    files = saved["shared"]["files"]
    monkeypatch.setattr(experiment, "file_digest", lambda name: files[name])
    monkeypatch.setattr(experiment, "model_identity", lambda model: saved["shared"]["model"])
    words = [word for name in files for word in (f"--{name}", name)]
    config = parse("tlora compare", CompareConfig, [str(folder.with_suffix(".yaml")), *words])
    name = comparetrials.digest(experiment.experiment(config.record))
    assert name == saved["experiment"]
    comparison = comparetrials.Comparison(config.record, saved["metric"], saved["better"], name)
    known = {trial.name for trial in comparison.tuning()}
    known |= {
        trial.name
        for entry in config.record.entries()
        for rate in entry.learning_rates
        for trial in comparison.final(entry, rate)
    }
    runs = {file.stem for file in (folder / "runs").glob("*.json")}
    assert runs
    assert runs <= known
