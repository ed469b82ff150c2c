"""Real runs of a comparison, as small as can be."""

import importlib.metadata
import json
import mmap
import shutil
from pathlib import Path

import pytest
import torch

from tlora import cli
from tlora.compare import compare, onerun
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.experiment import experiment
from tlora.compare.queue import Workers
from tlora.errors import ConfigError, DataError
from tlora.report import comparison
from tlora.tasks.dataconfig import DataConfig
from tlora.training import preflight
from tlora.training.digests import file_digest, model_identity
from tlora.training.runconfig import RunConfig
from tlora.training.setup import settle


@pytest.fixture
def records(compared):
    _, folder, _ = compared
    return {(r["method"], r["phase"]): r for r in map(folder.record, folder.names())}


def test_a_comparison_runs_to_its_end(compared):
    progress, folder, lines = compared
    assert (progress.finished, progress.total) == (4, 4)
    assert progress.failed == []
    assert lines[0] == "run 1 of 4 (tuning), lora, learning rate 0.01, seed 0: starts"
    ended = "run 1 of 4 (tuning), lora, learning rate 0.01, seed 0: finished, validation loss "
    assert lines[1].startswith(ended)
    assert lines[-1].endswith(" s")
    assert len(lines) == 8
    assert sorted(p.name for p in folder.path.iterdir() if p.name[0] != ".") == [
        "adapters",
        "compare.json",
        "logs",
        "runs",
    ]
    assert sorted(p.name.split("-")[0] for p in folder.adapters.iterdir()) == ["lora", "tlora"]


def test_the_same_command_again_does_what_is_missing(compared, shared, tmp_path, monkeypatch):
    folder = CompareFolder(shutil.copytree(compared[1].path, tmp_path / "out"))
    (tmp_path / "killed").mkdir()  # as a command leaves it that is killed before its first record
    (tmp_path / "killed" / ".lock").touch()
    first = next(name for name in folder.names() if name.startswith("lora") and "final" in name)
    jobs = []
    monkeypatch.setattr(Workers, "work", lambda self, ready, settled: jobs.append(ready()))

    def again(path="out", **fields):
        jobs.clear()
        compare.run(CompareConfig(**shared | {"output_dir": str(tmp_path / path)} | fields))
        return jobs[0] and jobs[0].name

    assert again() is None
    kept = {name: folder.record(name) for name in folder.names()}
    assert again("killed").startswith("lora-lr0.01-seed0-tuning")
    assert again(learning_rates=[1e-3]).startswith("lora-lr0.001-seed0-tuning")
    assert {name: folder.record(name) for name in folder.names()} == kept
    folder.record_file(first).unlink()
    assert again() == first


def test_the_page_is_made_from_the_files_alone(compared, tmp_path, capsys):
    _, folder, _ = compared
    copy = tmp_path / "elsewhere"
    (copy / "runs").mkdir(parents=True)
    for file in [folder.path / "compare.json", *folder.runs.iterdir()]:
        (copy / file.relative_to(folder.path)).write_bytes(file.read_bytes())
    assert cli.main(["inspect", str(copy)]) == 0
    said = capsys.readouterr().out
    page = (copy / "report.html").read_text()
    for method, rank in (("lora", None), ("tlora", "q_proj")):
        score = folder.record(
            next(n for n in folder.names() if n.startswith(method) and "final" in n)
        )["scores"]["test"]["loss"]
        assert f"{score:.4f}" in page
        assert f"{score:.4f}" in said
        assert rank is None or rank in page
    assert "Tie: " in page  # one seed tells nothing apart
    assert (copy / "report.md").read_text() in said
    assert len((copy / "report.csv").read_text().splitlines()) == 1 + 4


def test_records_are_of_like_runs_that_are_scored_on_their_own_rows(records):
    order = {key: record["data_order"] for key, record in records.items()}
    assert order["lora", "final"] == order["tlora", "final"]
    assert order["lora", "tuning"] == order["tlora", "tuning"]
    assert order["lora", "final"] != order["lora", "tuning"]
    for (_, phase), record in records.items():
        assert record["scores"].keys() == {"test" if phase == "final" else "validation"}
        memory = record["memory"]
        assert 0 < memory["bytes"] == max(memory["stages"].values()) < 2**30


def test_a_run_that_diverges_is_an_outcome_without_a_score(shared, tmp_path):
    wild = {"methods": ["lora"], "learning_rates": [1e-2, 1e30]}
    lines = []
    config = CompareConfig(**shared | wild, output_dir=str(tmp_path / "out"))
    progress = compare.run(config, tell=lines.append)
    assert (progress.finished, progress.total, progress.failed) == (3, 3, [])
    assert any(": diverged at step 2, after " in line for line in lines)
    folder = CompareFolder(tmp_path / "out")
    found = {(r["phase"], r["learning_rate"]): r for r in map(folder.record, folder.names())}
    assert found.keys() == {("tuning", 1e-2), ("tuning", 1e30), ("final", 1e-2)}
    stopped, trained = found["tuning", 1e30], found["tuning", 1e-2]
    assert (stopped["diverged"], stopped["scores"]) == (2, {})
    assert (trained["diverged"], trained["steps"]) == (None, 3)
    assert stopped["config"] != trained["config"]
    assert stopped["rows"] == trained["rows"]
    [problem] = comparison.read(folder).problems
    assert problem.run == "lora, tuning run, learning rate 1e+30, seed 0"
    assert problem.cause == "the training diverged at step 2"


def test_a_record_says_where_it_comes_from(records):
    record = records["tlora", "final"]
    assert record["config"]["adapter"]["whiten"] is False  # defaults are written out
    assert record["config"]["trainer"]["learning_rate"] == record["learning_rate"] == 1e-2
    assert record["seed"] == record["config"]["seed"] == record["config"]["adapter"]["seed"] == 1
    assert record["provenance"]["packages"]["torch"] == importlib.metadata.version("torch")
    assert record["provenance"]["git"].keys() == {"commit", "dirty"}
    assert record["provenance"]["hardware"]["torch_threads"] == record["threads"]
    assert record["rows"] == {"train": 20, "test": 24}
    assert (record["steps"], record["batch"]) == (3, 2)
    assert [step for step, _ in record["curves"]["loss"]] == [1, 2, 3]
    assert record["seconds"].keys() == {"load", "initialise", "train", "evaluate"}
    assert record["plan"]["model.layers.0.self_attn.q_proj"].keys() == {"rank", "scale"}
    assert records["lora", "final"]["plan"] is None


def test_a_record_names_no_folder_of_this_machine(compared, shared):
    _, folder, _ = compared
    files = [*folder.runs.iterdir(), folder.path / "compare.json"]
    for file in files:
        text = file.read_text()
        assert str(Path(shared["model"]).parents[1]) not in text
        assert str(folder.path) not in text


def test_the_peak_is_that_of_its_stage():
    from tlora.training.peak_memory import PeakMemory

    size = 64 * 2**20
    memory = PeakMemory(torch.device("cpu"))
    with mmap.mmap(-1, size) as held:  # malloc might give memory that is resident already
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        memory.stage("large")
    memory.stage("small")
    assert size * 0.9 < memory.stages["large"] < size * 1.5
    assert memory.to_dict()["bytes"] == max(memory.stages.values())


def test_held_out_rows_are_the_same_for_every_run_and_apart(shared):
    config = CompareConfig(**shared)
    setup = settle(config.run_config(config.entries()[0], 1e-2, 7))
    train, held = onerun.split(setup, 0.25, seed=0)
    assert (len(train), len(held)) == (18, 6)
    seen = [tuple(row) for row in [*train["input_ids"], *held["input_ids"]]]
    assert sorted(seen) == sorted(map(tuple, setup.train["input_ids"]))
    assert onerun.split(setup, 6, seed=0)[1]["input_ids"][:] == held["input_ids"][:]
    assert onerun.split(setup, 6, seed=1)[1]["input_ids"][:] != held["input_ids"][:]
    with pytest.raises(DataError, match="holds out 24 of 24 training rows"):
        onerun.split(setup, 24, seed=0)


def test_a_file_of_validation_rows_leaves_all_training_rows(shared, tmp_path):
    file = tmp_path / "validation.jsonl"
    file.write_text('{"prompt": "new", "response": "1"}\n' * 3)
    config = CompareConfig(**shared | {"validation": str(file)})
    train, held = onerun.split(compare.check(config), str(file), seed=0)
    assert (len(train), len(held)) == (24, 3)


def test_flags_and_files_are_checked_once(shared, monkeypatch):
    calls, before = [], preflight.check
    monkeypatch.setattr(preflight, "check", lambda *args: calls.append(args) or before(*args))
    compare.check(CompareConfig(**shared))
    assert len(calls) == 1


def test_overlap_is_looked_for_once_in_a_comparison(shared, tmp_path, monkeypatch):
    rows = Path(shared["train_file"]).read_text().splitlines()
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join([rows[2], rows[20], '{"prompt": "new", "response": "1"}']))
    data = DataConfig(overlap="drop")
    changes = {"test_file": str(file), "data": data, "output_dir": str(tmp_path / "out")}
    jobs = []
    monkeypatch.setattr(Workers, "work", lambda self, ready, settled: jobs.append(ready()))
    config = CompareConfig(**shared | changes)
    compare.run(config)
    (job,) = jobs
    assert job.payload["left_out"] == [2, 20]
    monkeypatch.delattr("tlora.training.setup.overlapping_rows")
    setup, _, _ = onerun._rows(RunConfig.from_dict(job.payload["config"]), job.payload)
    held = len(setup.held_out)
    assert held > 0
    assert len(setup.train) + held == 22


def test_what_trains_is_counted_by_where_it_belongs(tiny_bert_classifier):
    import peft

    base = tiny_bert_classifier()
    names = {onerun._base_name(name) for name, _ in base.named_parameters()}
    head = sum(p.numel() for p in base.classifier.parameters())
    options = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    counts = onerun.count_parameters(peft.get_peft_model(base, options), names)
    assert counts == {"adapter": 2 * 2 * (16 + 16), "others": head}
    whole = tiny_bert_classifier()
    everything = sum(p.numel() for p in whole.parameters())
    assert onerun.count_parameters(whole, names) == {"adapter": 0, "others": everything}


def test_the_identity_of_an_experiment_is_in_its_contents(shared, tmp_path):
    first = experiment(CompareConfig(**shared))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(Path(shared["train_file"]).read_bytes())
    assert experiment(CompareConfig(**shared | {"train_file": str(moved)})) == first
    moved.write_bytes(moved.read_bytes() + b'{"prompt": "a", "response": "b"}\n')
    assert experiment(CompareConfig(**shared | {"train_file": str(moved)})) != first
    for change in (
        {"trainer": {"max_steps": 4}},
        {"validation": 5},
        {"validation_seed": 1},
        {"task": "gsm8k"},
        {"data": DataConfig(overlap="drop")},
        {"data": DataConfig(overlap="drop", guard="gsm8k-paper")},
    ):
        assert experiment(CompareConfig(**shared | change)) != first
    for same in (
        {"title": "x"},
        {"jobs": 3},
        {"adapter": {"r": 3}},
        {"learning_rates": [1.0]},
        {"data": DataConfig(overlap="allow", guard="gsm8k-paper", guard_dir="data")},
    ):
        assert experiment(CompareConfig(**shared | same)) == first
    templates = []
    for name, text in (("a.jinja", "one"), ("b.jinja", "one"), ("c.jinja", "two")):
        (tmp_path / name).write_text(text)
        data = DataConfig(format="chat", chat_template=str(tmp_path / name))
        templates.append(experiment(CompareConfig(**shared | {"data": data})))
    assert templates[0] == templates[1] != templates[2]
    assert model_identity("a/name-on-the-hub") == "a/name-on-the-hub"
    assert first["model"] == model_identity(shared["model"]) != shared["model"]
    assert first["files"]["train_file"] == file_digest(shared["train_file"])


def test_a_model_is_known_by_weights_and_tokenizer_wherever_it_lies(shared, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(shared["model"], folder)
    (folder / "README.md").write_text("says nothing of the model")
    assert model_identity(str(folder)) == model_identity(shared["model"])
    for name in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        before = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(before + b" ")
        assert model_identity(str(folder)) != model_identity(shared["model"]), name
        (folder / name).write_bytes(before)


def test_what_is_guarded_against_matters_where_rows_are_dropped_and_its_folder_never(shared):
    def dropping(**fields):
        return CompareConfig(**shared | {"data": DataConfig(overlap="drop", **fields)})

    guarded = dropping(guard="gsm8k-paper", guard_dir="one")
    assert experiment(guarded) == experiment(dropping(guard="gsm8k-paper", guard_dir="two"))
    assert experiment(guarded) != experiment(dropping())
    said = onerun.portable(guarded)["data"]
    assert (said["guard"], said["guard_dir"]) == (["gsm8k-paper"], None)


SAME_ROWS = object()
"""Stands for the training file, which is made later."""
TEST_ROWS = object()
"""Stands for the file of test rows."""


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"test_file": None}, ConfigError, "there are no test rows; give --test_file"),
        ({"metric": "los"}, ConfigError, "but the scores are 'loss', 'exact_match'. Did you"),
        ({"validation": 24}, DataError, "holds out 24 of 24 training rows"),
        ({"model": None}, ConfigError, "`model` is missing"),
        ({"test_file": SAME_ROWS}, DataError, "of 24 training rows, 24 repeat a prompt of"),
        ({"validation": SAME_ROWS}, DataError, "of 24 training rows, 24 repeat a prompt of"),
        (
            {"validation": TEST_ROWS},
            DataError,
            "rows that choose the learning rate cannot also report",
        ),
        (
            {"trainer": {"max_step": 3}},
            ConfigError,
            "no field `max_step`. Did you mean 'max_steps'",
        ),
        (
            {"trainer": {"per_device_train_batch_size": 0}},
            ConfigError,
            "`per_device_train_batch_size` is 0; give a whole number, 1 or more.",
        ),
        ({"trainer": {"report_to": "nosuch"}}, ConfigError, "`report_to` names 'nosuch'"),
        (
            {"methods": ["lora", {"name": "tlora", "adapter": {"modules_to_save": "haed"}}]},
            ConfigError,
            "tlora: `modules_to_save` names 'haed', but no module",
        ),
        (
            {"methods": ["lora", {"name": "dora", "adapter": {"task_type": "SEQ_CLS"}}]},
            ConfigError,
            "dora: `task_type` is 'SEQ_CLS', but this task is 'CAUSAL_LM'",
        ),
        ({"adapter": {"target_modules": ["lm_head"]}}, ConfigError, "tlora: `target_modules` cho"),
    ],
)
def test_a_fault_comes_before_anything_is_written(shared, tmp_path, fields, error, message):
    files = {SAME_ROWS: "train_file", TEST_ROWS: "test_file"}
    fields = {
        name: shared[files[value]] if type(value) is object else value
        for name, value in fields.items()
    }
    config = CompareConfig(**shared | {"output_dir": str(tmp_path / "out")} | fields)
    with pytest.raises(error) as fault:
        compare.run(config)
    assert message in str(fault.value)
    assert not (tmp_path / "out").exists()


def test_the_metric_is_the_tasks_own_unless_another_is_given(shared, tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [{"text": f"so {n}", "label": "yes" if n % 2 else "no"} for n in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {"kind": "classification", "text_column": "text", "label_column": "label"}
    data = DataConfig(**names, overlap="allow")
    labeled = shared | {"train_file": str(rows), "test_file": str(rows), "data": data}
    for fields, expected in (
        (shared, ("loss", "lower")),
        (labeled, ("accuracy", "higher")),
        (labeled | {"metric": "eval_loss"}, ("loss", "lower")),
        (labeled | {"metric": "f1_macro", "better": "lower"}, ("f1_macro", "lower")),
    ):
        config = CompareConfig(**fields)
        found = compare.identify(config, compare.check(config))
        assert (found.metric, found.better) == expected


def test_each_job_gets_one_of_the_visible_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert compare.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert compare.visible_gpus() == ["3", "5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compare.visible_gpus() == []
