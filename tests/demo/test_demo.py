"""The demonstration, cut short: what it promises about its files and its adapter."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tlora import cli
from tlora.demo import corpus, summary
from tlora.demo import run as demo
from tlora.errors import ConfigError

RUN = subprocess.run


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
        patch.setattr(subprocess, "run", in_this_process)
        yield patch


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with shortened():
        return folder, demo.run(str(folder), seed=0, steps=2)


def test_base_cannot_do_the_task_and_both_methods_are_scored(result):
    _, done = result
    scores = {score.method: score for score in done.scores}
    assert list(scores) == ["base", "lora", "tlora"]
    assert scores["base"].exact_match < 0.2
    assert scores["base"].trainable == 0
    assert 0 < scores["tlora"].trainable < scores["lora"].trainable


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


def test_the_page_shows_the_plan_and_the_table_is_on_disk(result):
    folder, done = result
    assert done.adapter == folder / "tlora" / "adapter"
    page = Path(summary.page(done.adapter.parent))
    assert page == folder / "plan.html"
    assert page.read_text(encoding="utf-8").count('<table class="map">') == 4
    saved = json.loads((folder / "demo.json").read_text())
    assert [score["method"] for score in saved["scores"]] == ["base", "lora", "tlora"]


def test_the_same_command_again_keeps_what_is_finished_and_does_the_rest(result, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(result[0], folder)
    (folder / "plan.html").write_text("a page")
    (folder / "notes.txt").write_text("mine")
    second = demo.RunFolder(folder / "tlora")
    second.start(second.config(), "train", None, second.inputs())
    (folder / "test.jsonl").unlink()
    kept = (folder / "lora" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    with shortened():
        again = demo.run(str(folder), seed=0, steps=2)
    exact = [(score.method, score.exact_match) for score in result[1].scores]
    assert [(score.method, score.exact_match) for score in again.scores] == exact
    assert (folder / "lora" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == kept
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
        assert len(demo.run(str(folder), steps=2).scores) == 3


def interrupt():
    raise KeyboardInterrupt


def test_another_seed_or_anothers_folder_is_refused_and_left_alone(result, tmp_path):
    folder, _ = result
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "demo.json").write_text("{}")
    before = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))]
    for call in (demo.run, demo.write_rows):
        with pytest.raises(ConfigError, match=r"`seed` is 1, but .* was started with 0; give it"):
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
        demo._reload_alone(model, tokenizer, demo.RunFolder(folder / "tlora"), ["1+1="])


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
