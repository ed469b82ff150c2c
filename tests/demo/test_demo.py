"""The demonstration, cut short: what it promises about its files and its adapter."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from tlora import cli
from tlora.demo import corpus, summary
from tlora.demo import run as demo
from tlora.errors import ConfigError

RUN = subprocess.run
QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
COMPARISON = yaml.safe_load((QUALITY / "base-ledger-seeds.yaml").read_text())


def in_this_process(command, **options):
    """Run Python code here, where all is imported; but as there, it cannot import tlora."""
    if command[:2] != [sys.executable, "-c"]:
        return RUN(command, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:2] + command[3:])
        patch.setitem(sys.modules, "tlora", None)
        exec(command[2], {})
    return subprocess.CompletedProcess(command, 0)


@contextlib.contextmanager
def shortened():
    task = corpus.shifted_task
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "shifted_task", lambda seed: task(seed, train=100, test=20))
        patch.setattr(demo, "_SEEDS", (2,))
        patch.setattr(subprocess, "run", in_this_process)
        yield patch


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with shortened():
        return folder, demo.run(str(folder), seed=0, steps=2)


METHODS = ["base", "lora", "paper-rule", "recommended"]


def test_base_cannot_do_the_task_and_each_method_is_scored(result):
    _, done = result
    scores = {score.method: score for score in done.scores}
    assert list(scores) == METHODS
    assert scores["base"].mean < 0.2
    assert scores["base"].trainable == 0
    # With equal ranks B alone has 25,600 parameters, about half of LoRA's.
    assert scores["recommended"].trainable == 25_600
    assert scores["lora"].trainable == 48_640
    assert 0 < scores["paper-rule"].trainable < 25_600


def test_each_method_has_three_seeds_that_chose_no_learning_rate(result, tmp_path, monkeypatch):
    trained = []

    def train(name, folder, train_file, seed, steps):
        trained.append((name, folder.name, seed))
        return demo.RunFolder(result[0] / f"{name}-2")

    seeds = demo._SEEDS
    monkeypatch.setattr(demo, "_train", train)
    with shortened() as patch:
        patch.setattr(demo, "_SEEDS", seeds)
        done = demo.run(str(tmp_path / "out"), seed=10)
    assert trained == [
        (name, f"{name}-{seed}", seed) for name in METHODS[1:] for seed in (12, 13, 14)
    ]
    assert [len(score.exact_match) for score in done.scores] == [1, 3, 3, 3]
    assert not {*seeds} & {*COMPARISON["tuning_seeds"]}


def test_a_method_runs_as_its_preset_says_and_as_in_the_committed_comparison(result):
    for name in METHODS[1:]:
        run = demo.RunFolder(result[0] / f"{name}-2").config()
        assert run["method"] == ("lora" if name == "lora" else "tlora")
        for field, value in COMPARISON["trainer"].items():
            assert run["trainer"].get(field, value) == (2 if field == "max_steps" else value)
        assert COMPARISON["adapter"].items() <= run["adapter"].items()
        paper = name == "paper-rule"
        assert run["adapter"].get("allocate_rank", paper) is paper
        assert run["adapter"].get("allocate_scale", paper) is paper


def test_the_learning_rates_are_those_that_the_committed_comparison_chose():
    with (QUALITY / "base-ledger-seeds" / "report.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "final"]
    chosen = {row["method"]: float(row["learning_rate"]) for row in rows}
    assert {
        "lora": chosen["lora"],
        "paper-rule": chosen["the paper's rule"],
        "recommended": chosen["tlora, equal ranks and scales"],
    } == demo._RATES
    assert COMPARISON["trainer"]["max_steps"] == demo._STEPS


def test_the_table_has_four_rows_with_mean_and_spread():
    scores = [demo.Score("base", 0, [0.01], [])]
    scores += [demo.Score(name, 5, [0.2, 0.4, 0.9], []) for name in METHODS[1:]]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary.table(scores))
    lines = console.export_text().splitlines()
    base, *others = [line.split() for line in lines if line.split()[:1] and "%" in line]
    assert base == ["base", "0", "1.0%"]
    assert [line[0] for line in others] == METHODS[1:]
    for line in others:
        assert line[1:] == ["5", "50.0%", "20.0%", "40.0%", "90.0%"]


def test_peft_alone_gives_the_same_logits(result):
    _, done = result
    assert done.difference < 1e-5


def test_the_test_rows_are_kept_and_none_is_a_training_row(result):
    folder, done = result
    train, test = (
        [json.loads(line)["prompt"] for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )
    assert len(test) == done.test_rows
    assert not set(train) & set(test)


def test_the_page_shows_each_seed_and_the_losses_and_the_table_is_on_disk(result):
    folder, done = result
    assert done.adapter == folder / "recommended-2" / "adapter"
    page = Path(summary.page(done))
    assert page == folder / "demo.html"
    text = page.read_text(encoding="utf-8")
    assert text.count('class="seed"') == text.count('class="mean"') == 4
    assert text.count('class="own"') == 0  # two steps are fewer than the log's interval
    saved = json.loads((folder / "demo.json").read_text())
    assert [score["method"] for score in saved["scores"]] == METHODS


def test_the_losses_are_means_over_seeds(tmp_path):
    runs = []
    for seed, loss in ((2, 1.0), (3, 3.0)):
        run = demo.RunFolder(tmp_path / str(seed))
        run.path.mkdir()
        for step in (10, 20):
            run.append_log({"step": step, "loss": loss * step})
        run.append_log({"step": 20, "train_runtime": 5.0})
        run.measured = lambda: {"trainable_parameters": 5}
        runs.append(run)
    score = demo._score("lora", runs, [0.25, 0.75])
    assert score.loss == [(10, 20.0), (20, 40.0)]
    assert (score.mean, score.trainable) == (0.5, 5)


def test_the_same_command_again_keeps_what_is_finished_and_does_the_rest(result, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(result[0], folder)
    (folder / "demo.html").write_text("a page")
    (folder / "notes.txt").write_text("mine")
    second = demo.RunFolder(folder / "recommended-2")
    second.start(second.config(), "train", None, second.inputs())
    (folder / "test.jsonl").unlink()
    kept = (folder / "lora-2" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    with shortened():
        again = demo.run(str(folder), seed=0, steps=2)
    exact = [(score.method, score.exact_match) for score in result[1].scores]
    assert [(score.method, score.exact_match) for score in again.scores] == exact
    assert (folder / "lora-2" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    assert (folder / "test.jsonl").read_bytes() == (result[0] / "test.jsonl").read_bytes()
    assert (folder / "notes.txt").read_text() == "mine"


def test_stopped_before_it_trained_a_demo_starts_again(tmp_path):
    folder = tmp_path / "out"
    stop = pytest.raises(KeyboardInterrupt)
    with shortened() as patch, stop:
        patch.setattr(demo, "_load_base", interrupt)
        demo.run(str(folder), steps=2)
    assert sorted(path.name for path in folder.iterdir()) == [
        "demo.json",
        "test.jsonl",
        "train.jsonl",
    ]
    with shortened():
        assert len(demo.run(str(folder), steps=2).scores) == 4


def interrupt():
    raise KeyboardInterrupt


def test_another_seed_or_anothers_folder_is_refused_and_left_alone(result, tmp_path):
    folder, _ = result
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "demo.json").write_text("{}")
    before = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))]
    for call in (demo.run, demo.write_rows):
        with pytest.raises(
            ConfigError, match=r"`seed` is 1, but .* was started with 0; use the same value"
        ):
            call(str(folder), seed=1)
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            call(str(tmp_path))
        with pytest.raises(ConfigError, match=r"demo\.json was not written by `tlora demo`"):
            call(str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="`rows_only` is True, but"):
        demo.write_rows(str(folder))
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))] == before


def test_an_adapter_that_peft_reads_differently_is_reported(result, monkeypatch):
    def other(command, **_):
        save_file({"logits": torch.zeros(1)}, command[5])
        return subprocess.CompletedProcess(command, 0)

    folder, _ = result
    monkeypatch.setattr(subprocess, "run", other)
    model, tokenizer = demo._load_base()
    with pytest.raises(demo.AdapterError, match="its logits differ"):
        demo._reload_alone(model, tokenizer, demo.RunFolder(folder / "recommended-2"), ["1+1="])


def test_the_rows_of_every_task_alone(tmp_path, capsys):
    assert cli.main(["demo", "--rows_only", "--output_dir", str(tmp_path / "rows")]) == 0
    told = capsys.readouterr()
    (tmp_path / "rows" / "ledger" / "test.jsonl").unlink()
    edited = tmp_path / "rows" / "spelled" / "train.jsonl"
    edited.write_text(edited.read_text() + "\n")
    assert cli.main(["demo", "--rows_only", "--output_dir", str(tmp_path / "rows")]) == 0
    assert edited.read_text().endswith("\n\n")
    edited.write_text(edited.read_text()[:-1])
    for form in corpus.SHIFTED:
        train, test = (
            [json.loads(line) for line in (tmp_path / "rows" / form / name).open()]
            for name in ("train.jsonl", "test.jsonl")
        )
        assert (train, test) == corpus.shifted_task(0, test=500, form=form)
        assert f"{form}: " in told.out + told.err
    assert demo.BASE_MODEL in told.out + told.err
