"""The order of a comparison's runs, stopping and going on: with stand-ins for the runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tlora.compare.compare import work
from tlora.compare.compareconfig import CompareConfig
from tlora.compare.comparefolder import CompareFolder
from tlora.compare.queue import Workers
from tlora.compare.trials import Comparison, Schedule
from tlora.errors import ConfigError

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


def run_in(path, jobs=2, tell=lambda text: None, **fields):
    schedule = schedule_in(path, **fields)
    return work(schedule, Workers("fake_runs:run", jobs=jobs), tell)


def names_in(path):
    return set(CompareFolder(path).names())


def starts_in(path):
    return (path / "starts.txt").read_text().split()


def test_final_runs_are_at_the_rate_that_validation_chose_and_nothing_runs_twice(tmp_path):
    progress = run_in(tmp_path)
    assert (progress.finished, progress.total) == (RUNS, RUNS)
    folder = CompareFolder(tmp_path)
    records = [folder.record(name) for name in folder.names()]
    finals = [r for r in records if r["phase"] == "final"]
    assert {(r["method"], r["learning_rate"]) for r in finals} == {("lora", 0.01), ("tlora", 0.01)}
    assert sorted(r["seed"] for r in finals) == [2, 2, 3, 3, 4, 4]
    assert all(r["scores"].keys() == {"test"} for r in finals)
    assert list(folder.logs.iterdir()) == []
    assert run_in(tmp_path).finished == RUNS
    assert len(starts_in(tmp_path)) == RUNS
    with folder.locked(), pytest.raises(ConfigError, match="another process"), folder.locked():
        pass


def test_each_run_is_reported_when_it_starts_and_when_it_ends_by_the_same_number(tmp_path):
    fields = {"learning_rates": [1e-2], "tuning_seeds": [0], "final_seeds": [1]}
    (tmp_path / "crash").write_text("tlora-lr0.01-seed0")
    lines = []
    run_in(tmp_path, jobs=1, tell=lines.append, **fields)
    assert [line.rpartition(", after")[0] or line for line in lines] == [
        "run 1 of 4 (tuning), lora, learning rate 0.01, seed 0: starts",
        "run 1 of 4 (tuning), lora, learning rate 0.01, seed 0: finished, validation accuracy"
        " 0.9000",
        "run 2 of 4 (tuning), tlora, learning rate 0.01, seed 0: starts",
        "run 2 of 3 (tuning), tlora, learning rate 0.01, seed 0: failed, exit code 1",
        "run 3 of 3 (final), lora, learning rate 0.01, seed 1: starts",
        "run 3 of 3 (final), lora, learning rate 0.01, seed 1: finished, test accuracy 0.9001",
    ]


def test_more_seeds_and_methods_add_runs_to_what_is_there(tmp_path):
    run_in(tmp_path, methods=["lora"], final_seeds=[2])
    before = starts_in(tmp_path)
    run_in(tmp_path)
    assert len(starts_in(tmp_path)) == RUNS
    assert starts_in(tmp_path)[: len(before)] == before


def test_a_crashed_run_is_recorded_its_rate_out_and_it_is_tried_again(tmp_path):
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
    (tmp_path / "crash").unlink()
    assert run_in(tmp_path).failed == []  # it is tried again
    comparison = schedule_in(tmp_path).comparison
    lora = comparison.config.entries()[0]
    assert comparison.chosen(lora, folder) == 0.01
    for trial in comparison.final(lora, 0.01):
        assert folder.record(trial.name)["status"] == "finished"


def test_a_method_without_any_whole_rate_has_no_final_runs(tmp_path):
    (tmp_path / "crash").write_text("tlora")
    progress = run_in(tmp_path)
    assert len(progress.failed) == 6
    assert (progress.finished, progress.total) == (6 + 3, 12 + 3)


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
import sys
sys.path[:0] = {paths!r}
from test_compare_queue import run_in
if __name__ == "__main__":
    from pathlib import Path
    run_in(Path(sys.argv[1]))
"""


@pytest.fixture
def started(tmp_path):
    """Start a comparison whose run of tlora at 0.1 never ends; return it, and that run's pid."""
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "wait").write_text("tlora-lr0.1-seed0")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(paths=[str(Path(__file__).parent)]))
    process = subprocess.Popen([sys.executable, script, folder], stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(names_in(folder)) == 11 and (folder / "waiting.pid").is_file())
        yield process, folder, int((folder / "waiting.pid").read_text())
    finally:
        process.kill()
        process.wait()


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
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
