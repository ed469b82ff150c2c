"""The order of a comparison's runs, stopping and going on: with stand-ins for the runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import fake_runs
import pytest

from tlora.compare.compare import work
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.queue import Workers
from tlora.compare.trials import Comparison, Schedule
from tlora.errors import ArtifactError, ConfigError

FIELDS = {
    "methods": ["lora", "tlora"],
    "learning_rates": [1e-3, 1e-2, 1e-1],
    "tuning_seeds": [0, 1],
    "final_seeds": [2, 3, 4],
}
RUNS = 2 * 3 * 2 + 2 * 3


def schedule_in(path, **fields):
    config = CompareConfig(**FIELDS | {"output_dir": str(path)} | fields)
    Path(path).mkdir(exist_ok=True)
    return Schedule(Comparison(config, "accuracy", "higher", "experiment"), CompareFolder(path))


def run_in(path, jobs=2, **fields):
    schedule = schedule_in(path, **fields)
    return work(schedule, Workers("fake_runs:run", jobs=jobs), lambda text: None)


def names_in(path):
    return set(CompareFolder(path).names())


def starts_in(path):
    return (path / "starts.txt").read_text().split()


def test_final_runs_are_at_the_rate_that_validation_chose(tmp_path):
    progress = run_in(tmp_path)
    assert (progress.finished, progress.total) == (RUNS, RUNS)
    folder = CompareFolder(tmp_path)
    records = [folder.record(name) for name in folder.names()]
    finals = [r for r in records if r["phase"] == "final"]
    assert {(r["method"], r["learning_rate"]) for r in finals} == {("lora", 0.01), ("tlora", 0.01)}
    assert sorted(r["seed"] for r in finals) == [2, 2, 3, 3, 4, 4]
    assert all(r["scores"].keys() == {"test"} for r in finals)
    assert list(folder.logs.iterdir()) == []


def test_a_second_call_runs_nothing_again(tmp_path):
    run_in(tmp_path)
    before = starts_in(tmp_path)
    assert len(before) == len(set(before)) == RUNS
    assert run_in(tmp_path).finished == RUNS
    assert starts_in(tmp_path) == before


def test_more_seeds_and_methods_add_runs_to_what_is_there(tmp_path):
    run_in(tmp_path, methods=["lora"], final_seeds=[2])
    before = starts_in(tmp_path)
    run_in(tmp_path)
    assert len(starts_in(tmp_path)) == RUNS
    assert starts_in(tmp_path)[: len(before)] == before


def test_a_crashed_run_is_recorded_and_its_rate_is_out(tmp_path):
    (tmp_path / "crash").write_text("lora-lr0.01-seed1")
    progress = run_in(tmp_path)
    assert progress.finished == RUNS - 1
    assert len(progress.failed) == 1
    assert progress.failed[0].endswith("exit code 1: RuntimeError: no luck with this one")
    folder = CompareFolder(tmp_path)
    records = [folder.record(name) for name in folder.names()]
    failed = [r for r in records if r["status"] == "failed"]
    assert [r["error"]["last_lines"][0] for r in failed] == ["about to fail"]
    chosen = {r["learning_rate"] for r in records if (r["method"], r["phase"]) == ("lora", "final")}
    assert chosen == {0.001}  # the best of the rates with both seeds


def test_a_crashed_run_is_tried_again_by_the_next_call(tmp_path):
    (tmp_path / "crash").write_text("lora-lr0.01-seed1")
    run_in(tmp_path)
    (tmp_path / "crash").unlink()
    assert run_in(tmp_path).failed == []
    folder = CompareFolder(tmp_path)
    comparison = schedule_in(tmp_path).comparison
    lora = comparison.config.entries()[0]
    assert comparison.chosen(lora, folder) == 0.01
    for trial in comparison.final(lora, 0.01):
        assert folder.record(trial.name)["status"] == "finished"


def test_a_run_whose_process_fails_after_it_is_done_counts(tmp_path, caplog):
    (tmp_path / "late").write_text("lora-lr0.01-seed1")
    progress = run_in(tmp_path)
    assert (progress.finished, progress.failed) == (RUNS, [])
    assert "is done, though its process ended badly (exit code 3)" in caplog.text
    assert run_in(tmp_path).finished == RUNS
    assert len(starts_in(tmp_path)) == RUNS


def test_a_method_without_any_whole_rate_has_no_final_runs(tmp_path):
    (tmp_path / "crash").write_text("tlora")
    progress = run_in(tmp_path)
    assert len(progress.failed) == 6
    assert (progress.finished, progress.total) == (6 + 3, 12 + 3)
    assert progress.waiting == []


def test_the_shards_together_are_the_whole(tmp_path):
    run_in(tmp_path / "whole")
    parts = [tmp_path / str(number) for number in (1, 2, 3)]
    for number, path in enumerate(parts, start=1):
        assert run_in(path, shard=f"{number}/3").waiting == ["lora", "tlora"]
    found = [names_in(path) for path in parts]
    assert [len(names) for names in found] == [4, 4, 4]
    assert len(set.union(*found)) == 12
    merged = parts[0]
    for path in parts[1:]:
        for file in (path / "runs").iterdir():
            (merged / "runs" / file.name).write_bytes(file.read_bytes())
    for number in (1, 2, 3):
        assert run_in(merged, shard=f"{number}/3").waiting == []
    assert names_in(merged) == names_in(tmp_path / "whole")
    assert sum(len(starts_in(path)) for path in parts) == RUNS


@pytest.mark.parametrize(("methods", "parts"), [(2, 2), (4, 2), (4, 4), (6, 3)])
def test_no_method_falls_to_one_machine(tmp_path, methods, parts):
    names = ["lora", "tlora", "dora", "rslora", "pissa", "full"][:methods]
    fields = {"methods": names, "tuning_seeds": [0, 1], "final_seeds": [2, 3, 4, 5]}

    def in_parts():
        shards = [f"{number}/{parts}" for number in range(1, parts + 1)]
        return [list(schedule_in(tmp_path, shard=shard, **fields)) for shard in shards]

    def assert_shared(found, runs):
        assert sorted(len(trials) for trials in found) == [methods * runs // parts] * parts
        counts = [Counter(trial.entry.name for trial in trials) for trials in found]
        for name in names:
            shares = [count[name] for count in counts]
            assert max(shares) - min(shares) <= 1

    assert_shared(in_parts(), runs=2 * 3)
    run_in(tmp_path, jobs=1, **fields)
    folder = CompareFolder(tmp_path)
    for name in folder.names():
        if "-final-" in name:
            folder.record_file(name).unlink()
    assert_shared(in_parts(), runs=4)


def test_the_order_of_runs_is_fair_to_the_methods(tmp_path):
    tuning = schedule_in(tmp_path).comparison.tuning()
    assert [(p.entry.name, p.learning_rate, p.seed) for p in tuning[:4]] == [
        ("lora", 0.001, 0),
        ("tlora", 0.001, 0),
        ("tlora", 0.01, 0),
        ("lora", 0.01, 0),
    ]
    assert [p.seed for p in tuning] == [0] * 6 + [1] * 6


def test_a_run_is_named_by_what_defines_it(tmp_path):
    def names(**fields):
        comparison = schedule_in(tmp_path, **fields).comparison
        return [trial.name for trial in comparison.tuning()]

    assert names() == names(
        methods=[{"name": "lora", "label": "LoRA", "adapter": {"r": 8}}, "tlora"],
        title="another",
        jobs=7,
        threads=3,
        final_seeds=[9],
    )
    assert not set(names()) & set(names(adapter={"r": 4}))
    assert len(set(names())) == 12
    rows = {"name": "tlora", "label": "64 rows", "calibration": {"samples": 64}}
    assert not set(names(methods=[rows])) & set(names())


SCRIPT = """
import json, sys
sys.path[:0] = {paths!r}
from test_compare_queue import run_in
if __name__ == "__main__":
    from pathlib import Path
    run_in(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""


@contextmanager
def another_process(folder, **fields):
    """Do a comparison in a process of its own, which has ended when this has."""
    script = folder.parent / "script.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parent)]))
    process = subprocess.Popen(
        [sys.executable, script, folder, json.dumps(fields)], stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def started(tmp_path):
    """Start a comparison whose run of tlora at 0.1 never ends; return it, and that run's pid."""
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "wait").write_text("tlora-lr0.1-seed0")
    with another_process(folder) as process:
        until(lambda: len(names_in(folder)) == 11 and (folder / "waiting.pid").is_file())
        yield process, folder, int((folder / "waiting.pid").read_text())


def test_two_parts_at_once_in_one_folder_leave_each_other_alone(tmp_path):
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "wait").write_text("lora-lr0.001-seed0")  # the first run of the first part
    with another_process(folder, shard="1/2", jobs=1) as first:
        until((folder / "waiting.pid").is_file)
        assert run_in(folder, shard="2/2").failed == []
        (folder / "wait").unlink()
        first.wait(timeout=120)
    records = map(CompareFolder(folder).record, names_in(folder))
    assert {record["status"] for record in records} == {"finished"}
    for number in (1, 2):
        assert run_in(folder, shard=f"{number}/2").waiting == []
    assert len(starts_in(folder)) == RUNS


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_comparison_leaves_no_process_and_goes_on(started, number):
    process, folder, child = started
    kept = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    assert alive(child)
    os.kill(process.pid, number)
    process.wait(timeout=60)
    until(lambda: not alive(child))
    assert names_in(folder) == {Path(name).stem for name in kept}
    (folder / "wait").unlink()
    assert run_in(folder).finished == RUNS
    for name, written in kept.items():
        assert (folder / "runs" / name).stat().st_mtime_ns == written
    assert sorted(starts_in(folder)).count(child_name(folder)) == 2


def child_name(folder):
    return next(name for name in names_in(folder) if name.startswith("tlora-lr0.1-seed0"))


def test_a_second_process_at_the_same_part_is_refused(tmp_path):
    folder = CompareFolder(tmp_path / "c")
    other = CompareFolder(tmp_path / "c")
    refused = pytest.raises(ConfigError, match="another process is at part 1/2")
    with folder.locked("1/2"), other.locked("2/2"), refused, other.locked("1/2"):
        pass
    with other.locked("1/2"):
        pass
    refused = pytest.raises(ConfigError, match=r"part 1/2 .* runs of part 1/1 too")
    with folder.locked("1/2"), refused, other.locked("1/1"):
        pass
    with other.locked("1/1"):
        pass


def test_another_parts_half_copied_record_is_one_that_is_not_there_yet(tmp_path):
    run_in(tmp_path, shard="1/2")
    other = schedule_in(tmp_path, shard="2/2")
    half = next(iter(other))
    file = other.folder.record_file(half.name)
    file.write_text('{"kind": "tlora comp')
    assert run_in(tmp_path, shard="1/2").waiting == ["lora", "tlora"]
    with pytest.raises(ArtifactError, match=r"damaged\. Remove it, and its run is done again"):
        list(other)
    file.unlink()
    run_in(tmp_path, shard="2/2")
    assert run_in(tmp_path, shard="1/2").waiting == []


@pytest.mark.parametrize("what", ["another run", "a file", "in a file"])
def test_a_folder_that_is_not_free_is_refused_and_left_alone(tmp_path, what):
    place = tmp_path / "out"
    if what == "another run":
        place.mkdir()
        (place / "run.json").write_text(json.dumps({"kind": "tlora run"}))
    else:
        place.write_text("words")
    before = sorted(tmp_path.rglob("*"))
    folder = CompareFolder(place / "deeper" if what == "in a file" else place)
    refused = pytest.raises(
        ConfigError, match=r"(holds something else|is a file|written to); choose"
    )
    with refused, folder.locked("1/1"):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_the_stand_in_scores_as_the_tests_assume():
    assert fake_runs.score("lora", 0.01, 0) > fake_runs.score("lora", 0.001, 1)
