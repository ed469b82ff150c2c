"""Default learning rates come from other comparisons alone, and their runs are done once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.firsttry import best_elsewhere
from tlora.compare.onerun import portable
from tlora.compare.trials import Comparison, Schedule, saved
from tlora.errors import ArtifactError, ConfigError

RATES = [1e-3, 1e-2, 1e-1]


@pytest.fixture
def rows(tmp_path):
    """Write a file of rows that are those of a task."""

    def made(task):
        (tmp_path / f"{task}.jsonl").write_text(task)
        return str(tmp_path / f"{task}.jsonl")

    return made


@pytest.fixture
def elsewhere(tmp_path):
    """Write another comparison: by label its best rate, or None if all its runs failed."""

    def made(task, best, unfinished="", **fields):
        fields = {
            "methods": [*best],
            "learning_rates": RATES,
            "tuning_seeds": [0],
            "output_dir": str(tmp_path / "others" / task),
        } | fields
        config = CompareConfig(**fields)
        comparison, folder = (
            Comparison(config, "loss", "lower", task),
            CompareFolder(config.output_dir),
        )
        folder.path.mkdir(parents=True)
        digests = {f"{side}_file": digest(task) for side in ("train", "test")}
        folder.start(
            {
                "config": portable(config),
                "defaults": {e.name: e.changed_defaults() for e in config.entries()},
                "shared": {"files": digests},
                "experiment": task,
                "metric": "loss",
                "better": "lower",
            }
        )
        for entry in config.entries():
            for trial in comparison.tuning_of(entry):
                rate = best[entry.label]
                record = trial.record() | {"status": "finished", "scores": {}}
                if rate is not None:
                    loss = abs(trial.learning_rate - rate)
                    record["scores"] = {"validation": {"loss": loss}}
                if not trial.name.startswith(unfinished or "none"):
                    folder.write_record(trial.name, record)
        return config.output_dir

    return made


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def here(first_try=(), **fields):
    return CompareConfig(
        **{"methods": ["lora", "pissa"], "learning_rates": RATES, "first_try": [*first_try]}
        | fields
    )


def test_a_default_is_the_geometric_median_of_the_best_rates_of_other_tasks(elsewhere, rows):
    folders = [
        elsewhere("sums", {"lora": 1e-3, "dora": 1e-1}),
        elsewhere("code", {"lora": 1e-1, "pissa": None}),
    ]
    found = best_elsewhere(here(folders, train_file=rows("mine")))
    assert found == {"lora": [("others/sums", 1e-3), ("others/code", 1e-1)], "pissa": []}
    config = here(folders)
    made = Comparison(config, "loss", "lower", "mine", first_try=found)
    lora, pissa = config.entries()
    assert made.default(lora) == 1e-2
    assert made.default(pissa) is None


def test_a_method_is_the_same_at_any_rank_and_another_with_other_options_or_scale(elsewhere):
    methods = [
        {"name": "lora", "label": "low", "adapter": {"r": 4, "lora_alpha": 4}},
        {"name": "lora", "label": "high", "adapter": {"r": 16, "lora_alpha": 16}},
        {"name": "lora", "label": "scaled", "adapter": {"r": 16, "lora_alpha": 32}},
        {"name": "lora", "label": "dropout", "adapter": {"lora_dropout": 0.1}},
    ]
    best = {"low": 1e-3, "high": 1e-1, "scaled": 1e-1, "dropout": 1e-1}
    folder = elsewhere("sums", best, methods=methods)
    assert best_elsewhere(here([folder], methods=["lora"])) == {"lora": [("others/sums", 1e-2)]}
    twice = {"name": "lora", "adapter": {"lora_alpha": 16}}
    assert best_elsewhere(here([folder], methods=[twice])) == {"lora": [("others/sums", 1e-1)]}


def test_all_folders_that_cannot_be_used_are_refused_at_once(elsewhere, rows, tmp_path):
    same = elsewhere("mine", {"lora": 1e-3})
    begun = elsewhere("sums", {"lora": 1e-3}, unfinished="lora-lr0.1-")
    config = here([same, begun, str(tmp_path)], train_file=rows("mine"))
    with pytest.raises(ConfigError) as refused:
        best_elsewhere(config)
    assert [fault.split(": ", 1)[-1] for fault in refused.value.faults] == [
        f"{same} has rows of this comparison; a default learning rate has to come from other"
        " tasks: leave the folder out.",
        "tuning runs of lora are missing; finish that comparison, or leave the folder out of"
        " `first_try`.",
        "there is no compare.json; give the folder of a comparison.",
    ]


def test_rows_are_the_same_whatever_they_are_for_and_datasets_by_their_names(elsewhere, rows):
    same = elsewhere("mine", {"lora": 1e-3})
    with pytest.raises(ConfigError, match="has rows of this comparison"):
        best_elsewhere(here([same], train_file=rows("other"), test_file=rows("mine")))
    assert best_elsewhere(here([same], train_file=rows("other")))["lora"] == [("others/mine", 1e-3)]


def test_only_a_folder_with_the_method_has_to_be_finished(elsewhere):
    folder = elsewhere("sums", {"lora": 1e-3, "dora": 1e-1}, unfinished="dora")
    assert best_elsewhere(here([folder], methods=["lora"]))["lora"] == [("others/sums", 1e-3)]
    with pytest.raises(ArtifactError, match="tuning runs of dora are missing"):
        best_elsewhere(here([folder], methods=["dora"]))


def runs_of(folder, made, best):
    """Do all runs, the best loss at the rates ``best``; return phase, label, rate and seed."""
    schedule, done = Schedule(made, CompareFolder(folder)), []
    while trial := schedule.next():
        rows = "test" if trial.phase == "final" else "validation"
        scores = {rows: {"loss": abs(trial.learning_rate - best[trial.entry.label])}}
        record = trial.record() | {"status": "finished", "scores": scores}
        schedule.folder.write_record(trial.name, record)
        done.append((trial.phase, trial.entry.label, trial.learning_rate, trial.seed))
    assert schedule.counts() == (len(done), len(done))
    return done


def test_the_first_try_adds_the_final_seeds_at_its_rate_and_no_run_is_done_twice(tmp_path):
    config = here(tuning_seeds=[0], final_seeds=[1, 2])
    origins = {"lora": [("sums", 1e-2)], "pissa": [("sums", 2e-3)]}
    plain = Comparison(config, "loss", "lower", "mine")
    without = runs_of(tmp_path / "without", plain, {"lora": 1e-2, "pissa": 1e-2})
    made = Comparison(config, "loss", "lower", "mine", first_try=origins)
    done = runs_of(tmp_path / "with", made, {"lora": 1e-2, "pissa": 1e-2})
    # LoRA's default is its tuned rate: nothing more runs.
    assert len(done) == len(set(done))
    assert {*done} - {*without} == {("final", "pissa", 2e-3, seed) for seed in (1, 2)}
    assert {*without} <= {*done}
    assert [*Schedule(made, CompareFolder(tmp_path / "with"))] == []
    # The choice of the tuned rate does not look at them.
    pissa = config.entries()[1]
    assert made.chosen(pissa, CompareFolder(tmp_path / "with")) == 1e-2


def test_a_method_that_diverges_at_all_its_rates_still_has_its_first_try(tmp_path):
    config = here(methods=["lora"], tuning_seeds=[0], final_seeds=[1])
    made = Comparison(config, "loss", "lower", "mine", first_try={"lora": [("sums", 5e-4)]})
    folder = CompareFolder(tmp_path)
    for trial in made.tuning():
        folder.write_record(trial.name, trial.record() | {"status": "finished", "scores": {}})
    assert [(t.phase, t.learning_rate) for t in Schedule(made, folder)] == [("final", 5e-4)]


def test_the_folder_tells_the_defaults_without_the_other_folders(elsewhere, tmp_path):
    other = elsewhere("sums", {"lora": 1e-2})
    config = here([other], methods=["lora"])
    folder = CompareFolder(tmp_path / "mine")
    folder.path.mkdir()
    folder.start(
        {
            "config": portable(config),
            "experiment": "mine",
            "metric": "loss",
            "better": "lower",
            "first_try": best_elsewhere(config),
        }
    )
    assert str(tmp_path) not in (folder.path / "compare.json").read_text()
    for file in sorted(Path(other).rglob("*.json")):
        file.unlink()
    made = saved(folder)
    assert made.config.first_try == ["others/sums"]
    assert made.default(made.config.entries()[0]) == 1e-2


def test_folders_are_given_once_and_name_no_run():
    with pytest.raises(ConfigError, match="folders, each once"):
        here(["a", "a"])
    trials = [Comparison(c, "loss", "lower", "x").tuning() for c in (here(["a"]), here())]
    assert [t.name for t in trials[0]] == [t.name for t in trials[1]]
